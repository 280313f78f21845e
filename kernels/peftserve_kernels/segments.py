"""Segments of the flat batch: contiguous token ranges that use one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """S contiguous ranges of the M batch tokens, each with the slot of its adapter.

    start: int32 [S + 1]; slot: int32 [S]; both on the compute device. Tokens start[i] .. start[i + 1] (end excluded)
    use the adapter in slot[i]. Tokens before start[0] and after start[S] use none. S may be 0, a segment may be
    empty. bounds: the same on the host, (first token, end token, slot) a segment, so that nothing needs a device
    read.
    """

    start: Tensor
    slot: Tensor
    bounds: tuple[tuple[int, int, int], ...]

    @classmethod
    def build(cls, start: Sequence[int], slot: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """From host lists: S + 1 non-decreasing starts and S slots. Raises ValueError for anything else."""
        if len(start) != len(slot) + 1:
            raise ValueError(f"segments: {len(slot)} slots need {len(slot) + 1} starts, got {len(start)}")
        if start[0] < 0 or any(end < begin for begin, end in pairwise(start)):
            raise ValueError(f"segments: starts must be >= 0 and must not decrease, got {list(start)}")
        if any(index < 0 for index in slot):
            raise ValueError(f"segments: slots must be >= 0, got {list(slot)}")
        return cls(
            start=torch.tensor(start, dtype=torch.int32, device=device),
            slot=torch.tensor(slot, dtype=torch.int32, device=device),
            bounds=tuple((begin, end, index) for (begin, end), index in zip(pairwise(start), slot, strict=True)),
        )

    def __len__(self) -> int:
        """S, the number of segments. A batch without adapters of a kind has 0 and is false."""
        return len(self.bounds)
