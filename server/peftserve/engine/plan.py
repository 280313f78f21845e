"""What goes down to the runner and what comes back: `StepPlan` and `StepResult`. A leaf without torch.

The flat batch holds the tokens of all rows one after another. Rows are ordered by adapter kind and slot, so
the tokens of one adapter are one contiguous segment: no sort, no gather, and kernels see only `Segments`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftserve.types import AdapterKind, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to pick the next token of a row.

    `position` is that token's place in the output, and in the request's random stream, so that a seed gives the same
    tokens whatever else runs and also after a preemption. `seed` is always set (drawn at arrival when the client gave
    none). `token_counts` (see `count_tokens`) is there when a penalty needs it: a view of the request's own.
    `banned_token_ids` may not be sampled now (end-of-sequence and stop tokens below `min_tokens`).
    """

    params: SamplingParams
    seed: int
    position: int
    token_counts: Mapping[int, int] | None = None
    banned_token_ids: frozenset[int] = frozenset()


def count_tokens(prompt: Sequence[int], output: Sequence[int]) -> dict[int, int]:
    """How often each token stands in `output`, with 0 for those that stand only in `prompt`."""
    counts = dict.fromkeys(prompt, 0)
    counts.update(Counter(output))
    return counts


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in the batch: `num_tokens` new tokens after `num_computed` that are already in the KV cache.

    All in KV positions, the adapter's virtual tokens included: the first new token is stored at and rotated for
    position `num_computed`, which is >= the adapter's prefix length; attention sees positions
    `0 .. num_computed + num_tokens`. `block_table[i]` is the KV page of positions `i * page_size ...`; it covers all
    of them. `sample` is None for a prefill chunk that does not reach the end of the prompt.
    """

    request_id: str
    kind: AdapterKind
    slot: int  # adapter slot within its kind; 0 and meaningless for BASE and PREFIX
    token_ids: Sequence[int]
    num_computed: int
    block_table: Sequence[int]
    sample: SampleSpec | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Contiguous runs of batch tokens that use one adapter: tokens `start[i] .. start[i + 1]` use `slot[i]`."""

    start: tuple[int, ...] = (0,)
    slot: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `num_tokens` positions of KV page `src` to `dst`, all layers, before the step computes."""

    src: int
    dst: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: rows in batch order, their segments per adapter kind, and page copies to do first."""

    step: int
    rows: tuple[Row, ...]
    page_copies: tuple[PageCopy, ...] = ()
    lora: SegmentPlan = field(default_factory=SegmentPlan)
    bottleneck: SegmentPlan = field(default_factory=SegmentPlan)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token picked for one row; `logprobs` when the request asked for them.

    `is_finite` is False when the row's logits were NaN or infinite: the token means nothing then.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    is_finite: bool = True


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per request id, what the rows with a `sample` gave. Rows without one are not in it."""

    step: int
    sampled: dict[str, Sampled]


def segments(rows: Sequence[Row], kind: AdapterKind) -> SegmentPlan:
    """The segments of `kind` in a batch whose rows are ordered by (kind, slot)."""
    starts: list[int] = []
    slots: list[int] = []
    offset = end = 0
    for row in rows:
        if row.kind is kind:
            if not slots or slots[-1] != row.slot:
                starts.append(offset)
                slots.append(row.slot)
            end = offset + row.num_tokens
        offset += row.num_tokens
    return SegmentPlan(start=(*starts, end), slot=tuple(slots)) if slots else SegmentPlan()
