"""finite_rows: which rows are free of NaN and infinity."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op


def finite_rows(x: Tensor) -> Tensor:
    """Whether each row has neither NaN nor infinity: bool [M].

    x: float32 [M, N]. Raises ValueError when it is anything else.
    """
    if x.ndim != 2 or x.dtype != torch.float32:
        raise ValueError(f"x: must be float32 [M, N], got {x.dtype} {list(x.shape)}")
    return select(_IMPLEMENTATIONS, x.device)(x)


def finite_rows_reference(x: Tensor) -> Tensor:
    """torch's own."""
    return x.isfinite().all(dim=-1)


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor], Tensor]]] = {
    Backend.REFERENCE: finite_rows_reference,
    **native(cpu.finite_rows),
    **triton_op("elementwise", "finite_rows"),
}
