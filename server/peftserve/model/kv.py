"""The paged KV cache: two tensors for the life of the engine, and one pair of views a layer for the kernels."""

import torch

from peftserve.model.spec import ModelSpec
from peftserve_kernels.zeros import zeros

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, [num_pages, num_kv_heads, page_size, head_dim] each."""


class KvCache:
    """K and V of every layer, zeroed, [num_layers, num_pages, num_kv_heads, page_size, head_dim] in `dtype`.

    On the CPU memory is taken from the operating system as it is written for the first time.
    """

    def __init__(
        self, spec: ModelSpec, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        shape = (spec.num_layers, num_pages, spec.num_kv_heads, page_size, spec.head_dim)
        self.k = zeros(shape, dtype, device, huge_pages=True)
        self.v = zeros(shape, dtype, device, huge_pages=True)
        self.layers: tuple[LayerCache, ...] = tuple(zip(self.k.unbind(), self.v.unbind(), strict=True))

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes
