"""nf4_linear in C++: the weight is decoded in registers, or once a tile, and never exists as a whole."""

from torch import Tensor

from peftserve_kernels.cpu.extension import DTYPES, HAS_NATIVE, address, ops
from peftserve_kernels.cpu.tape import empty
from peftserve_kernels.cpu.threads import threads
from peftserve_kernels.nf4 import Nf4Layout, Nf4Weight


def has_int8_inputs() -> bool:
    """Whether the instruction set in use can round inputs to int8."""
    return HAS_NATIVE and ops.has_int8_inputs()


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, *, int8_inputs: bool = False) -> Tensor:
    """See `peftserve_kernels.nf4_linear`. A weight in rows is tiled first, at each call: tile it once at load.

    With bf16 activations on AMX the sixteen levels are bf16 and products are summed in float32, block by block; on
    AVX-512 with VNNI and on AVX2 both are 16-bit integers, scaled by block, with exact sums (`ShortDot` in
    kernels/native/gemm.h); elsewhere everything is float32. With `int8_inputs` they have 8 bits (`ByteDot` there;
    AVX-512 with VNNI only). The bits of a row of y depend on that row of x alone.
    """
    rows, (outputs, columns) = x.shape[0], weight.shape
    if weight.layout is not Nf4Layout.TILES:
        weight = weight.padded().tiled()
    x = x.contiguous()
    y = empty((rows, outputs), x.dtype)
    if bias is not None:
        bias = bias.float().contiguous()
    ops.nf4_linear(
        x.data_ptr(),
        y.data_ptr(),
        weight.packed.data_ptr(),
        weight.absmax.data_ptr(),
        address(bias),
        DTYPES[x.dtype],
        rows,
        columns,
        outputs,
        int8_inputs,
        threads(),
    )
    return y
