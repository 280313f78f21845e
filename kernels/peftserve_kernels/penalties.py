"""apply_penalties: what requests add to or take from logits before a token is picked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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
        """From host values, one entry a row of the logits. Rows without penalties cost nothing."""
        seen: list[tuple[int, int, int]] = []
        bias: list[tuple[int, int, float]] = []
        for index, row in enumerate(rows):
            if row.output_counts and (row.repetition != 1.0 or row.presence or row.frequency):
                seen.extend((index, token, count) for token, count in row.output_counts.items())
            if row.bias:
                bias.extend((index, token, value) for token, value in row.bias.items() if token not in row.banned)
            bias.extend((index, token, -torch.inf) for token in row.banned)

        def ids(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def floats(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            seen_row=ids([row for row, _, _ in seen]),
            seen_token=ids([token for _, token, _ in seen]),
            seen_count=floats([count for _, _, count in seen]),
            repetition=floats([row.repetition for row in rows]),
            presence=floats([row.presence for row in rows]),
            frequency=floats([row.frequency for row in rows]),
            bias_row=ids([row for row, _, _ in bias]),
            bias_token=ids([token for _, token, _ in bias]),
            bias_value=floats([value for _, _, value in bias]),
        )


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
