"""nf4_linear: a linear layer whose weight stays in NF4."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import nf4_linear as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, backend_for, select, triton_op
from peftserve_kernels.nf4 import NF4_BLOCK, Nf4Weight, dequantize_nf4

# Weights dequantised at a time: 1 MiB in float32. They stay in a core's cache between the look-up and the product, and
# the allocator serves such blocks without going back to the operating system (its page faults cost ten times the work).
_TILE_ELEMENTS: Final = 1 << 18

# Up to this many rows a bf16 input is multiplied in float32: rounding the weights to bf16 costs more than the faster
# product saves (measured at 576x1536, 1536x576 and 2048x2048; the two are equal at 8 rows).
_FLOAT32_MAX_ROWS: Final = 8


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, *, int8_inputs: bool = False) -> Tensor:
    """y = x W^T + bias, with W dequantised on the fly.

    x: float32, bfloat16 or float16 [M, K], M >= 0; weight: [N, K]; bias: [N] or None. Returns [M, N] in x's dtype.
    Not in place. Accumulates in float32 and rounds once; with float32 x nothing is rounded to less than float32, with
    bfloat16 x an implementation may round the weights, or the levels of NF4, to bfloat16.
    `int8_inputs`, for bfloat16 x: each block of 64 columns of x is rounded to integers of up to 127 times a scale of
    its own, and the levels of NF4 to 8 bits (`INT8_LEVEL_SCALE`), for products twice as fast.
    Raises ValueError when the shapes do not fit, or for int8 inputs that `why_no_int8_inputs` refuses.
    """
    rows, columns = weight.shape
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x: must be [M, {columns}], got {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias: must be [{rows}], got {list(bias.shape)}")
    if int8_inputs and (reason := why_no_int8_inputs(x.device, x.dtype)):
        raise ValueError(f"int8_inputs: {reason}")
    return select(_IMPLEMENTATIONS, x.device)(x, weight, bias, int8_inputs=int8_inputs)


def why_no_int8_inputs(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is missing for `int8_inputs` with activations of `dtype` on `device`; None when nothing is."""
    if dtype != torch.bfloat16:
        return f"they take bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    backend = backend_for(device)
    if backend is Backend.TRITON:
        return "they are there on the CPU only"
    if backend is Backend.CPU and Backend.CPU in _IMPLEMENTATIONS and not cpu.has_int8_inputs():
        return "they need a processor with AVX-512 and VNNI"
    return None


def prepare_nf4(weight: Nf4Weight) -> Nf4Weight:
    """`weight` in the layout that `nf4_linear` reads fastest on its device. Call it once, at load."""
    backend = backend_for(weight.packed.device)
    if backend is Backend.TRITON:
        return weight.padded().blocked()
    return weight.padded().tiled() if backend is Backend.CPU and Backend.CPU in _IMPLEMENTATIONS else weight


def nf4_linear_reference(
    x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, *, int8_inputs: bool = False
) -> Tensor:
    """Dequantise a tile of rows, multiply, next tile: the whole weight never exists in full precision.

    bf16 inputs of more than a few rows are multiplied with weights rounded to bf16 (as bitsandbytes does), float32
    accumulation; everything else is computed in float32, int8 inputs too.
    """
    weight = weight.row_major()
    rows, columns = weight.shape
    wide = x.dtype == torch.bfloat16 and x.shape[0] > _FLOAT32_MAX_ROWS and not int8_inputs
    compute = torch.bfloat16 if wide else torch.float32
    tile = max(1, _TILE_ELEMENTS // columns)
    inputs = _as_int8(x) if int8_inputs else x.to(compute)
    added = None if bias is None else bias.to(compute)
    parts = []
    for start in range(0, rows, tile):
        end = min(start + tile, rows)
        part = None if added is None else added[start:end]
        dense = dequantize_nf4(weight.rows(start, end), compute, int8_levels=int8_inputs)
        parts.append(functional.linear(inputs, dense, part))
    return torch.cat(parts, dim=1).to(x.dtype)


def _as_int8(x: Tensor) -> Tensor:
    """What is left of x, in float32, when each block of a row is rounded to integers of up to 127."""
    blocks = x.float().reshape(x.shape[0], x.shape[1] // NF4_BLOCK, NF4_BLOCK)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    factor = torch.full_like(largest, 127.0) / largest  # torch makes 127 / x from a rounded reciprocal
    steps = torch.where(largest > 0, (blocks * factor).round(), blocks)  # NaN stays NaN
    return (steps * (largest / 127)).view(x.shape)


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[..., Tensor]]] = {
    Backend.REFERENCE: nf4_linear_reference,
    **native(cpu.nf4_linear),
    **triton_op("nf4_linear", "nf4_linear"),
}
