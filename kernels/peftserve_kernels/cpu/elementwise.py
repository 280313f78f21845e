"""rms_norm, silu_mul and embedding in C++: ops that treat each row alone."""

import torch
from torch import Tensor

from peftserve_kernels.cpu.extension import DTYPES, ops


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """See `peftserve_kernels.rms_norm`."""
    rows, columns = x.shape
    x, weight = x.contiguous(), weight.float().contiguous()
    y = torch.empty((rows, columns), dtype=out_dtype)
    ops.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        DTYPES[out_dtype],
        rows,
        columns,
        eps,
        torch.get_num_threads(),
    )
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `peftserve_kernels.silu_mul`."""
    rows, width = gate_up.shape
    gate_up = gate_up.contiguous()
    y = torch.empty((rows, width // 2), dtype=gate_up.dtype)
    ops.silu_mul(gate_up.data_ptr(), y.data_ptr(), DTYPES[y.dtype], rows, width // 2, torch.get_num_threads())
    return y


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """See `peftserve_kernels.embedding`. Raises IndexError for an id outside the table."""
    (rows,), (entries, columns) = ids.shape, table.shape
    ids, table = ids.contiguous(), table.contiguous()
    y = torch.empty((rows, columns), dtype=torch.float32)
    done = ops.embedding(
        ids.data_ptr(),
        table.data_ptr(),
        y.data_ptr(),
        ids.dtype == torch.int64,
        DTYPES[table.dtype],
        rows,
        entries,
        columns,
        torch.get_num_threads(),
    )
    if not done:
        raise IndexError(f"ids: must be in 0 .. {entries - 1}, got {int(ids.min())} .. {int(ids.max())}")
    return y
