"""apply_penalties: every (row, token) pair is one lane. Pairs are distinct, so no two lanes write one logit."""

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.launch import launch

if TYPE_CHECKING:
    from peftserve_kernels.penalties import Penalties

# Scattered reads and writes: small programs spread them over more of the chip.
_BLOCK: Final = 128
_WARPS: Final = 4


def apply_penalties(logits: Tensor, penalties: "Penalties") -> None:
    """See `peftserve_kernels.apply_penalties`. Two launches, in order: bans and bias come last."""
    strides = (logits.stride(0), logits.stride(1))
    seen = penalties.seen_row.shape[0]
    if seen:
        launch(
            _seen_tokens,
            (triton.cdiv(seen, _BLOCK),),
            logits,
            *strides,
            penalties.seen_row,
            penalties.seen_token,
            penalties.seen_count,
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
            seen,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    biased = penalties.bias_row.shape[0]
    if biased:
        launch(
            _biased_tokens,
            (triton.cdiv(biased, _BLOCK),),
            logits,
            *strides,
            penalties.bias_row,
            penalties.bias_token,
            penalties.bias_value,
            biased,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


@triton.jit
def _seen_tokens(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    token_stride,
    rows,
    tokens,
    counts,
    repetitions,
    presences,
    frequencies,
    pairs,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < pairs
    row = tl.load(rows + index, mask=valid, other=0)
    token = tl.load(tokens + index, mask=valid, other=0)
    count = tl.load(counts + index, mask=valid, other=0.0)
    repetition = tl.load(repetitions + row, mask=valid, other=1.0)
    presence = tl.load(presences + row, mask=valid, other=0.0)
    frequency = tl.load(frequencies + row, mask=valid, other=0.0)
    at = logits + row * row_stride + token * token_stride
    value = tl.load(at, mask=valid, other=0.0)
    value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    value -= tl.where(count > 0, presence, 0.0) + count * frequency
    tl.store(at, value, mask=valid)


@triton.jit
def _biased_tokens(  # type: ignore[no-untyped-def]
    logits, row_stride, token_stride, rows, tokens, values, pairs, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < pairs
    row = tl.load(rows + index, mask=valid, other=0)
    token = tl.load(tokens + index, mask=valid, other=0)
    at = logits + row * row_stride + token * token_stride
    value = tl.load(at, mask=valid, other=0.0)
    tl.store(at, value + tl.load(values + index, mask=valid, other=0.0), mask=valid)
