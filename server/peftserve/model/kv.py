"""The paged KV cache: two tensors for the life of the engine, and one pair of views a layer for the kernels."""

import math
import mmap

import torch

from peftserve.model.spec import ModelSpec

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, [num_pages, num_kv_heads, page_size, head_dim] each."""


class KvCache:
    """K and V of every layer, zeroed, [num_layers, num_pages, num_kv_heads, page_size, head_dim] in `dtype`.

    On the CPU memory is taken from the operating system page by page as it is written for the first time.
    """

    def __init__(
        self, spec: ModelSpec, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        shape = (spec.num_layers, num_pages, spec.num_kv_heads, page_size, spec.head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.layers: tuple[LayerCache, ...] = tuple(zip(self.k.unbind(), self.v.unbind(), strict=True))

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every byte, and numpy asks for huge pages, of which 60 caches of 30 layers each touch one at
    # the first token. A plain mapping is zero and grows by 4 KiB.
    raw = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(raw, dtype=dtype).view(shape)
