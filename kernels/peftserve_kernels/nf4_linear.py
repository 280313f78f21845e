"""nf4_linear: a linear layer whose weight stays in NF4."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import nf4_linear as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, backend_for, select, triton_op
from peftserve_kernels.nf4 import Nf4Weight, dequantize_nf4

# Weights dequantised at a time: 1 MiB in float32. They stay in a core's cache between the look-up and the product, and
# the allocator serves such blocks without going back to the operating system (its page faults cost ten times the work).
_TILE_ELEMENTS: Final = 1 << 18

# Up to this many rows a bf16 input is multiplied in float32: rounding the weights to bf16 costs more than the faster
# product saves (measured at 576x1536, 1536x576 and 2048x2048; the two are equal at 8 rows).
_FLOAT32_MAX_ROWS: Final = 8


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, with W dequantised on the fly.

    x: float32, bfloat16 or float16 [M, K], M >= 0; weight: [N, K]; bias: [N] or None. Returns [M, N] in x's dtype.
    Not in place. Accumulates in float32 and rounds once; with float32 x nothing is rounded to less than float32, with
    bfloat16 x an implementation may round the weights, or the levels of NF4, to bfloat16.
    Raises ValueError when the shapes do not fit.
    """
    rows, columns = weight.shape
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x: must be [M, {columns}], got {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias: must be [{rows}], got {list(bias.shape)}")
    return select(_IMPLEMENTATIONS, x.device)(x, weight, bias)


def prepare_nf4(weight: Nf4Weight) -> Nf4Weight:
    """`weight` in the layout that `nf4_linear` reads fastest on its device. Call it once, at load."""
    backend = backend_for(weight.packed.device)
    if backend is Backend.TRITON:
        return weight.padded().blocked()
    return weight.padded().tiled() if backend is Backend.CPU and Backend.CPU in _IMPLEMENTATIONS else weight


def nf4_linear_reference(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """Dequantise a tile of rows, multiply, next tile: the whole weight never exists in full precision.

    bf16 inputs of more than a few rows are multiplied with weights rounded to bf16 (as bitsandbytes does), float32
    accumulation; everything else is computed in float32.
    """
    weight = weight.row_major()
    rows, columns = weight.shape
    wide = x.dtype == torch.bfloat16 and x.shape[0] > _FLOAT32_MAX_ROWS
    compute = torch.bfloat16 if wide else torch.float32
    tile = max(1, _TILE_ELEMENTS // columns)
    inputs = x.to(compute)
    added = None if bias is None else bias.to(compute)
    parts = []
    for start in range(0, rows, tile):
        end = min(start + tile, rows)
        part = None if added is None else added[start:end]
        parts.append(functional.linear(inputs, dequantize_nf4(weight.rows(start, end), compute), part))
    return torch.cat(parts, dim=1).to(x.dtype)


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor, Nf4Weight, Tensor | None], Tensor]]] = {
    Backend.REFERENCE: nf4_linear_reference,
    **native(cpu.nf4_linear),
    **triton_op("nf4_linear", "nf4_linear"),
}
