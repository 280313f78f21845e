"""apply_penalties: what requests add to or take from logits before a token is picked."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from peftserve_kernels.dispatch import Backend, select, triton_op


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """One row's penalties on the host.

    output_counts: how often each token stands in the output so far, with 0 for tokens that stand only in the prompt.
    bias: added to the logit of each token (OpenAI's logit_bias). banned: tokens that may not be picked now.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    output_counts: Mapping[int, int] | None = None
    bias: Mapping[int, float] | None = None
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False, slots=True)
class Penalties:
    """The penalties of B rows as lists of (row, token) pairs on the device: no [B, V] table is ever made.

    seen_row, seen_token: int64 [T], every token of the row's prompt or output, each pair once; seen_count: float32 [T],
    its occurrences in the output; repetition, presence, frequency: float32 [B].
    bias_row, bias_token: int64 [U], each pair once; bias_value: float32 [U], minus infinity for a banned token.
    """

    seen_row: Tensor
    seen_token: Tensor
    seen_count: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    bias_row: Tensor
    bias_token: Tensor
    bias_value: Tensor

    @classmethod
    def build(cls, rows: Sequence[RowPenalties], device: torch.device | str = "cpu") -> "Penalties":
        """From host values, one entry a row of the logits. Rows without penalties cost nothing.

        Built every step, over all tokens that the rows have seen: by numpy, without a Python step a token.
        """
        seen = [
            (index, row.output_counts)
            for index, row in enumerate(rows)
            if row.output_counts and (row.repetition != 1.0 or row.presence or row.frequency)
        ]
        biases = [(index, _biases(row)) for index, row in enumerate(rows) if row.bias or row.banned]
        return cls(
            seen_row=_row_of(seen, device),
            seen_token=_flat([counts.keys() for _, counts in seen], np.int64, device),
            seen_count=_flat([counts.values() for _, counts in seen], np.float32, device),
            repetition=_flat([[row.repetition for row in rows]], np.float32, device),
            presence=_flat([[row.presence for row in rows]], np.float32, device),
            frequency=_flat([[row.frequency for row in rows]], np.float32, device),
            bias_row=_row_of(biases, device),
            bias_token=_flat([bias.keys() for _, bias in biases], np.int64, device),
            bias_value=_flat([bias.values() for _, bias in biases], np.float32, device),
        )


def _biases(row: RowPenalties) -> Mapping[int, float]:
    return {**(row.bias or {}), **dict.fromkeys(row.banned, -math.inf)}


def _row_of(groups: Sequence[tuple[int, Mapping[int, float]]], device: torch.device | str) -> Tensor:
    rows = np.repeat(
        np.array([index for index, _ in groups], np.int64), np.array([len(group) for _, group in groups], np.int64)
    )
    return torch.from_numpy(rows).to(device)


def _flat(groups: Sequence[Collection[float]], dtype: type[np.generic], device: torch.device | str) -> Tensor:
    parts = [np.fromiter(group, dtype, len(group)) for group in groups]
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype)).to(device)


def apply_penalties(logits: Tensor, penalties: Penalties) -> None:
    """Change logits in place: repetition, then presence and frequency, then bias and bans.

    logits: float32 [B, V]. For each token seen in prompt or output: l = l / repetition if l > 0 else l * repetition
    (CTRL, Keskar et al. 2019, arXiv:1909.05858, as in transformers). For each token c > 0 times in the output: l = l
    - presence - c * frequency (OpenAI's definition). Then l = l + bias.
    Raises ValueError when logits is not float32 [B, V] with the B of the penalties.
    """
    if logits.dtype != torch.float32 or logits.ndim != 2 or logits.shape[0] != penalties.repetition.shape[0]:
        wanted = f"float32 [{penalties.repetition.shape[0]}, V]"
        raise ValueError(f"logits: must be {wanted}, got {logits.dtype} {list(logits.shape)}")
    select(_IMPLEMENTATIONS, logits.device)(logits, penalties)


def apply_penalties_reference(logits: Tensor, penalties: Penalties) -> None:
    """Gather the touched logits, change them, scatter them back."""
    row, token, count = penalties.seen_row, penalties.seen_token, penalties.seen_count
    seen = logits[row, token]
    repetition = penalties.repetition[row]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= (count > 0) * penalties.presence[row] + count * penalties.frequency[row]
    logits[row, token] = seen
    logits[penalties.bias_row, penalties.bias_token] += penalties.bias_value


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor, Penalties], None]]] = {
    Backend.REFERENCE: apply_penalties_reference,
    **triton_op("penalties", "apply_penalties"),
}
