"""rms_norm, residual_add, silu_mul and embedding in C++: ops that treat each row alone."""

import torch
from torch import Tensor

from peftserve_kernels.cpu.extension import DTYPES, ops
from peftserve_kernels.cpu.tape import empty
from peftserve_kernels.cpu.threads import threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """See `peftserve_kernels.rms_norm`."""
    rows, columns = x.shape
    x, weight = x.contiguous(), weight.float().contiguous()
    y = empty((rows, columns), out_dtype)
    ops.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        DTYPES[out_dtype],
        rows,
        columns,
        eps,
        threads(),
    )
    return y


def residual_add(residual: Tensor, hidden: Tensor, in_place: bool) -> Tensor:
    """See `peftserve_kernels.residual_add`. Raises ValueError when residual is not contiguous."""
    if not residual.is_contiguous():
        raise ValueError(f"residual: must be contiguous, got strides {list(residual.stride())}")
    rows, columns = hidden.shape
    hidden = hidden.contiguous()
    y = residual if in_place else empty(residual.shape, torch.float32)
    ops.residual_add(
        residual.data_ptr(),
        hidden.data_ptr(),
        y.data_ptr(),
        DTYPES[hidden.dtype],
        rows,
        columns,
        threads(),
    )
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `peftserve_kernels.silu_mul`."""
    rows, width = gate_up.shape
    gate_up = gate_up.contiguous()
    y = empty((rows, width // 2), gate_up.dtype)
    ops.silu_mul(gate_up.data_ptr(), y.data_ptr(), DTYPES[y.dtype], rows, width // 2, threads())
    return y


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """See `peftserve_kernels.embedding`. Raises IndexError for an id outside the table."""
    (rows,), (entries, columns) = ids.shape, table.shape
    ids, table = ids.contiguous(), table.contiguous()
    y = empty((rows, columns), torch.float32)
    done = ops.embedding(
        ids.data_ptr(),
        table.data_ptr(),
        y.data_ptr(),
        ids.dtype == torch.int64,
        DTYPES[table.dtype],
        rows,
        entries,
        columns,
        threads(),
    )
    if not done:
        raise IndexError(f"ids: must be in 0 .. {entries - 1}, got {int(ids.min())} .. {int(ids.max())}")
    return y
