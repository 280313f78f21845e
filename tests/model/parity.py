"""What parity means: every top-5 log-probability of the oracle met within a tolerance, and the same greedy tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftserve.engine.plan import Sampled

TOLERANCE = 1e-3
TOP = 5


@dataclass(frozen=True, slots=True)
class Expected:
    """What an oracle thinks at T positions: greedy `tokens` [T]; `top_ids`, `top_logprobs` [T, 5] of the likeliest."""

    tokens: Sequence[int]
    top_ids: Sequence[Sequence[int]]
    top_logprobs: Sequence[Sequence[float]]

    @classmethod
    def from_logits(cls, logits: torch.Tensor) -> "Expected":
        """From logits [T, vocab]."""
        best = logits.double().log_softmax(dim=-1).topk(TOP)
        return cls(best.indices[:, 0].tolist(), best.indices.tolist(), best.values.tolist())

    @property
    def margins(self) -> list[float]:
        """The lead of the likeliest token over the next, in nats."""
        return [row[0] - row[1] for row in self.top_logprobs]


def errors(sampled: Sequence[Sampled], expected: Expected) -> list[float]:
    """|difference| for each of the oracle's top-5 log-probabilities; all of them must be among those reported."""
    found = []
    for pick, ids, values in zip(sampled, expected.top_ids, expected.top_logprobs, strict=True):
        assert pick.logprobs is not None
        reported = dict(pick.logprobs.top)
        found += [abs(reported[token] - value) for token, value in zip(ids, values, strict=True)]
    return found


def misses(sampled: Sequence[Sampled], expected: Expected, margin: float) -> list[int]:
    """Positions where another token was picked although the oracle's leads by more than `margin` nats."""
    rows = zip(sampled, expected.tokens, expected.margins, strict=True)
    return [index for index, (pick, token, lead) in enumerate(rows) if lead > margin and pick.token_id != token]


def assert_parity(sampled: Sequence[Sampled], expected: Expected, tolerance: float = TOLERANCE) -> None:
    """The same tokens, and log-probabilities within `tolerance`."""
    assert [pick.token_id for pick in sampled] == list(expected.tokens)
    assert max(errors(sampled, expected)) < tolerance
