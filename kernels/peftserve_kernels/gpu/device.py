"""Functions that kernels share."""

import triton
import triton.language as tl

from peftserve_kernels.gpu.launch import INTERPRETED

# The interpreter multiplies the raw bits of bf16 operands: there they are upcast first.
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a b, float32 sums; float32 operands are not rounded to less (no TF32)."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
