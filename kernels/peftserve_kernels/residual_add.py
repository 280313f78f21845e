"""residual_add: a sublayer's output onto the residual stream."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op


def residual_add(residual: Tensor, hidden: Tensor, *, in_place: bool) -> Tensor:
    """y = residual + hidden, in float32.

    residual: float32 [M, D]; hidden: [M, D], float32, bfloat16 or float16. Returns float32 [M, D]: `residual` itself,
    overwritten, when `in_place`. Raises ValueError when the shapes differ or residual is not float32.
    """
    if residual.dtype != torch.float32 or residual.shape != hidden.shape:
        raise ValueError(
            f"residual must be float32 and of hidden's shape: {residual.dtype} {list(residual.shape)}, "
            f"{list(hidden.shape)}"
        )
    return select(_IMPLEMENTATIONS, residual.device)(residual, hidden, in_place)


def residual_add_reference(residual: Tensor, hidden: Tensor, in_place: bool) -> Tensor:
    """torch's own."""
    return residual.add_(hidden) if in_place else residual + hidden


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor, Tensor, bool], Tensor]]] = {
    Backend.REFERENCE: residual_add_reference,
    **native(cpu.residual_add),
    **triton_op("elementwise", "residual_add"),
}
