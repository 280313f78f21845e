"""linear_logits: the output head."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import linear as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op

# Head weights upcast at a time: 2 MiB in float32, small enough to stay in the cache and in the allocator's heap.
_TILE_ELEMENTS: Final = 1 << 19


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    """logits = x W^T in float32: products of the stored values, float32 sums, never rounded to less.

    x: [M, K]; weight: [N, K] (N is the vocabulary), both float32, bfloat16 or float16. Returns float32 [M, N]. Not in
    place. Raises ValueError when the shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x [M, K] and weight [N, K] do not fit: {list(x.shape)} and {list(weight.shape)}")
    return select(_IMPLEMENTATIONS, x.device)(x, weight)


def linear_logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    """A float32 product; narrower weights are upcast tile by tile."""
    inputs = x.float()
    if weight.dtype == torch.float32:
        return functional.linear(inputs, weight)
    logits = inputs.new_empty(x.shape[0], weight.shape[0])
    tile = max(1, _TILE_ELEMENTS // weight.shape[1])
    for out, part in zip(torch.split(logits, tile, dim=1), torch.split(weight, tile), strict=True):
        torch.mm(inputs, part.float().t(), out=out)
    return logits


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor, Tensor], Tensor]]] = {
    Backend.REFERENCE: linear_logits_reference,
    **native(cpu.linear_logits),
    **triton_op("linear", "linear_logits"),
}
