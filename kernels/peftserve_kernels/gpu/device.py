"""Functions that kernels share."""

import triton
import triton.language as tl

from peftserve_kernels.gpu.launch import INTERPRETED

# The interpreter multiplies the raw bits of bf16 operands: there they are upcast first.
_UPCAST = tl.constexpr(INTERPRETED)
# And it cuts float32 off to bfloat16 where the hardware rounds, and takes integers for its bits.
_CUTS_OFF = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a b, float32 sums; float32 operands are not rounded to less (no TF32)."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x as DTYPE, to the nearest, ties to even."""
    if _CUTS_OFF and DTYPE is tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def from_int8(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 x as a floating-point DTYPE, which holds it exactly."""
    if _CUTS_OFF:
        x = x.to(tl.float32)
    return x.to(DTYPE)
