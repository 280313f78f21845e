"""embedding: token ids to the residual stream."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """y[m] = table[ids[m]] as the float32 residual stream.

    ids: int64 or int32 [M], 0 <= id < V; table: [V, D], float32, bfloat16 or float16. Returns float32 [M, D], exact.
    Not in place. Raises ValueError for other shapes or dtypes of ids; an id outside the table is an error of the
    caller.
    """
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32) or table.ndim != 2:
        raise ValueError(f"ids must be integers [M], table [V, D]: {ids.dtype} {list(ids.shape)}, {list(table.shape)}")
    return select(_IMPLEMENTATIONS, ids.device)(ids, table)


def embedding_reference(ids: Tensor, table: Tensor) -> Tensor:
    """A gather, then an upcast of the gathered rows. On the CPU an id outside the table raises IndexError."""
    return functional.embedding(ids, table).float()


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor, Tensor], Tensor]]] = {
    Backend.REFERENCE: embedding_reference,
    **native(cpu.embedding),
    **triton_op("elementwise", "embedding"),
}
