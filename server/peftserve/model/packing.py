"""Parsed adapters packed in host memory just as they will lie on the device, so that placing one is a plain copy.

LoRA and bottleneck weights become blocks for the arena: pages of 8 rank rows, which an arena of int8 holds in 8 bits,
and vectors. Offsets in the packed tables count from the adapter's own first element. Prefix K and V become KV pages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from peftserve.adapters.formats.parsed import BottleneckAdapter, LoraAdapter, PrefixAdapter
from peftserve.adapters.safetensors import TensorView
from peftserve.errors import AdapterLoadError, InternalError
from peftserve.model.arena import align
from peftserve.model.dora import RowScales
from peftserve.model.spec import TARGET_NAMES, ModelSpec
from peftserve_kernels.activation import Activation
from peftserve_kernels.bottleneck import NUM_SITES, BottleneckInput
from peftserve_kernels.rank_pages import RANK_PAGE_ROWS, page_header, quantize_rows, rank_pages, vector_dtype

Floats = npt.NDArray[np.float32]
Tables = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A LoRA or bottleneck adapter: arena blocks, and one row for each device table.

    `data` [E] on the host; block i is `data[ends[i - 1] : ends[i]]`, its padding zero. `values` and `offsets` are rows
    for the tables of `LoraWeights` or `BottleneckWeights`, by field name; offsets (int64, -1 for none) count in `data`.
    """

    data: torch.Tensor
    ends: tuple[int, ...]
    values: Mapping[str, torch.Tensor]
    offsets: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(row.nbytes for row in (*self.values.values(), *self.offsets.values()))

    def without_weights(self) -> "PackedWeights":
        """The tables alone, with empty `data`."""
        return replace(self, data=self.data.new_empty(0))


@dataclass(frozen=True, slots=True)
class PackedPrefix:
    """`k`, `v` [layers, pages, kv_heads, page_size, head_dim] in the KV cache's dtype; zero past the last token."""

    k: torch.Tensor
    v: torch.Tensor
    num_tokens: int

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def without_weights(self) -> "PackedPrefix":
        """The length alone, with empty `k` and `v`."""
        return replace(self, k=self.k.new_empty(0), v=self.v.new_empty(0))


class _Stored(Protocol):
    """A tensor of the file, or one that is computed of several when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def float32(self) -> Floats: ...


@dataclass(frozen=True, slots=True)
class _Pages:
    """Rank rows of `columns` values, from element `start` on: `header` elements and 8 rows a page, then alignment."""

    start: int
    columns: int
    header: int

    @property
    def stride(self) -> int:
        return align(self.header + RANK_PAGE_ROWS * self.columns)

    def blocks(self, data: torch.Tensor, count: int) -> torch.Tensor:
        """The pages in `data`, [count, stride]."""
        return data[self.start : self.start + count * self.stride].view(count, -1)

    def write(self, data: torch.Tensor, rows: torch.Tensor) -> None:
        """Store `rows` [r, columns]; what is past them stays as it is."""
        count = rank_pages(len(rows))
        padded = rows.new_zeros(count * RANK_PAGE_ROWS, self.columns)
        padded[: len(rows)] = rows
        self.blocks(data, count)[:, self.header : self.header + RANK_PAGE_ROWS * self.columns] = padded.view(count, -1)


@dataclass(frozen=True, slots=True)
class _Factors:
    """Matrices of the file, [r, n] and [m, r], as pages of rows [r, n] and [r, m]."""

    stored: tuple[TensorView, TensorView]
    first: _Pages
    second: _Pages

    def write(self, data: torch.Tensor) -> None:
        rows = torch.from_numpy(self.stored[0].float32()), torch.from_numpy(self.stored[1].float32()).t()
        if data.dtype != torch.int8:
            self.first.write(data, rows[0])
            self.second.write(data, rows[1])
            return
        count = rank_pages(len(rows[0]))
        scales = torch.zeros(2, count * RANK_PAGE_ROWS)
        for half, pages in enumerate((self.first, self.second)):
            quantized, scales[half, : len(rows[half])] = quantize_rows(rows[half])
            pages.write(data, quantized)
        headers = scales.view(2, count, RANK_PAGE_ROWS).transpose(0, 1).reshape(count, -1).view(torch.int8)
        self.first.blocks(data, count)[:, : self.first.header] = headers


@dataclass(frozen=True, slots=True)
class _Vector:
    """Values [n] from element `start` on."""

    start: int
    stored: _Stored

    def write(self, data: torch.Tensor) -> None:
        values = torch.from_numpy(self.stored.float32()).to(vector_dtype(data.dtype))
        require_finite(values)
        elements = values.view(data.dtype)
        data[self.start : self.start + len(elements)] = elements


class _Packer:
    """Collects what becomes blocks of an arena of `dtype`; each takes up its elements, rounded up to the alignment.

    What is added stays in the file until `finish`, and then is converted part by part.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: list[_Factors | _Vector] = []
        self._ends: list[int] = []

    def factors(self, first: TensorView, second: TensorView) -> tuple[list[int], list[int]]:
        """Add matrices [r, n] and [m, r] as pages of 8 rank rows; returns the offsets of each one's."""
        rank, columns = first.shape
        header = page_header(self._dtype)
        first_pages, first_offsets = self._pages(rank, columns, header)
        second_pages, second_offsets = self._pages(rank, second.shape[0], 0)
        self._parts.append(_Factors((first, second), first_pages, second_pages))
        return first_offsets, second_offsets

    def vector(self, stored: _Stored) -> int:
        """Add [n] as a block of its own; returns its offset."""
        part = _Vector(self._end, stored)
        elements = stored.shape[0] * vector_dtype(self._dtype).itemsize // self._dtype.itemsize
        self._parts.append(part)
        self._ends.append(part.start + align(elements))
        return part.start

    def finish(self, *, values: Tables, offsets: Tables) -> PackedWeights:
        """The blocks, and the table rows. Raises `AdapterLoadError` when a weight exceeds the dtype's range."""
        data = torch.zeros(self._end, dtype=self._dtype)
        for part in self._parts:
            part.write(data)
        if self._dtype.is_floating_point:
            require_finite(data)
        return PackedWeights(data, tuple(self._ends), _tensors(values), _tensors(offsets))

    @property
    def _end(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _pages(self, rank: int, columns: int, header: int) -> tuple[_Pages, list[int]]:
        pages = _Pages(self._end, columns, header)
        offsets = [pages.start + index * pages.stride for index in range(rank_pages(rank))]
        self._ends += [offset + pages.stride for offset in offsets]
        return pages, offsets


def pack_lora(
    adapter: LoraAdapter, spec: ModelSpec, *, dtype: torch.dtype, max_rank: int, row_scales: RowScales | None
) -> PackedWeights:
    """A pages hold rows of A [r, in]; B pages hold rows of B^T [r, out]. A DoRA needs `row_scales`."""
    packer = _Packer(dtype)
    shape = (spec.num_layers, len(TARGET_NAMES))
    rank, scale = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    row_scale = np.full(shape, -1, np.int64)
    a_page, b_page = _no_pages(shape, max_rank), _no_pages(shape, max_rank)
    for where, module in sorted(adapter.modules.items()):
        rank[where], scale[where] = module.rank, module.scale
        used = rank_pages(module.rank)
        a_page[where][:used], b_page[where][:used] = packer.factors(module.a, module.b)
        if module.magnitude is not None:
            if row_scales is None:
                raise InternalError("a DoRA was to be loaded without the base's weights")
            row_scale[where] = packer.vector(row_scales.of(*where, module, module.magnitude))
    return packer.finish(
        values={"rank": rank, "scale": scale},
        offsets={"row_scale": row_scale, "a_page": a_page, "b_page": b_page},
    )


def pack_bottleneck(adapter: BottleneckAdapter, spec: ModelSpec, *, dtype: torch.dtype, max_rank: int) -> PackedWeights:
    """Down pages hold rows of W_down [w, hidden]; up pages hold rows of W_up^T [w, hidden]."""
    packer = _Packer(dtype)
    shape = (spec.num_layers, NUM_SITES)
    width, scale = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    down_page, up_page = _no_pages(shape, max_rank), _no_pages(shape, max_rank)
    down_bias, up_bias = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    for where, module in sorted(adapter.sites.items()):
        width[where], scale[where] = module.width, module.scale
        used = rank_pages(module.width)
        down_page[where][:used], up_page[where][:used] = packer.factors(module.down, module.up)
        down_bias[where] = packer.vector(module.down_bias)
        up_bias[where] = packer.vector(module.up_bias)
    activation = np.array(Activation[adapter.activation.value.upper()], np.int32)
    input_mode = np.array(BottleneckInput[adapter.input_mode.name], np.int32)
    return packer.finish(
        values={"width": width, "scale": scale, "activation": activation, "input_mode": input_mode},
        offsets={"down_page": down_page, "up_page": up_page, "down_bias": down_bias, "up_bias": up_bias},
    )


def pack_prefix(adapter: PrefixAdapter, *, dtype: torch.dtype, page_size: int) -> PackedPrefix:
    """K and V [layers, kv_heads, n, head_dim] cut into pages of `page_size` positions."""
    return PackedPrefix(
        _prefix_pages(adapter.key, dtype, page_size),
        _prefix_pages(adapter.value, dtype, page_size),
        adapter.num_virtual_tokens,
    )


def _prefix_pages(values: Floats, dtype: torch.dtype, page_size: int) -> torch.Tensor:
    layers, heads, length, head_dim = values.shape
    num_pages = -(-length // page_size)
    padded = torch.zeros(layers, heads, num_pages * page_size, head_dim, dtype=dtype)
    padded[:, :, :length] = torch.from_numpy(np.ascontiguousarray(values))
    require_finite(padded)
    return padded.view(layers, heads, num_pages, page_size, head_dim).transpose(1, 2).contiguous()


def _no_pages(shape: tuple[int, int], max_rank: int) -> npt.NDArray[np.int64]:
    return np.full((*shape, rank_pages(max_rank)), -1, np.int64)


def _tensors(rows: Tables) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(row) for name, row in rows.items()}


def require_finite(data: torch.Tensor, what: str = "a weight") -> None:
    """Raises `AdapterLoadError` saying that `what` overflowed."""
    # The files held finite numbers only, so an infinity is one that overflowed; both ends show it.
    if not all(bool(end.isfinite()) for end in data.aminmax()):
        raise AdapterLoadError(f"{what} exceeds the range of {data.dtype}; serve with bfloat16 or float32")
