"""Segments of the flat batch: contiguous token ranges that use one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

TILE_TOKENS: Final = 16
"""Most tokens of one segment that a Triton program takes: the rows of a tensor-core product."""


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """S contiguous ranges of the M batch tokens, each with the slot of its adapter.

    start: int32 [S + 1]; slot: int32 [S]; both on the compute device. Tokens start[i] .. start[i + 1] (end excluded)
    use the adapter in slot[i]. Tokens before start[0] and after start[S] use none. S may be 0, a segment may be
    empty. bounds: the same on the host, (first token, end token, slot) a segment, so that nothing needs a device
    read. tiles: int32 [T, 3], segments cut into pieces of at most `TILE_TOKENS` tokens, (first token, end token, slot)
    a tile, on the compute device: the programs of a Triton launch. Where the tables are refilled in place between
    replays of a captured step, unused tiles have first = end, and bounds, which nothing captured may read, is empty.
    """

    start: Tensor
    slot: Tensor
    bounds: tuple[tuple[int, int, int], ...]
    tiles: Tensor

    @classmethod
    def build(cls, start: Sequence[int], slot: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """From host lists: S + 1 non-decreasing starts and S slots. Raises ValueError for anything else."""
        if len(start) != len(slot) + 1:
            raise ValueError(f"segments: {len(slot)} slots need {len(slot) + 1} starts, got {len(start)}")
        if start[0] < 0 or any(end < begin for begin, end in pairwise(start)):
            raise ValueError(f"segments: starts must be >= 0 and must not decrease, got {list(start)}")
        if any(index < 0 for index in slot):
            raise ValueError(f"segments: slots must be >= 0, got {list(slot)}")
        bounds = tuple((begin, end, index) for (begin, end), index in zip(pairwise(start), slot, strict=True))
        tiles = tile_tokens(bounds)
        return cls(
            start=torch.tensor(start, dtype=torch.int32, device=device),
            slot=torch.tensor(slot, dtype=torch.int32, device=device),
            bounds=bounds,
            tiles=torch.tensor(tiles, dtype=torch.int32, device=device).view(len(tiles), 3),
        )

    def __len__(self) -> int:
        """S, the number of segments. A batch without adapters of a kind has 0 and is false."""
        return self.slot.shape[0]


def tile_tokens(bounds: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Segments (first token, end token, slot) cut into pieces of at most `TILE_TOKENS` tokens; empty ones give none."""
    return [
        (first, min(first + TILE_TOKENS, end), slot)
        for begin, end, slot in bounds
        for first in range(begin, end, TILE_TOKENS)
    ]
