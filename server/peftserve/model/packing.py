"""Parsed adapters packed in host memory just as they will lie on the device, so that placing one is a plain copy.

LoRA and bottleneck weights become blocks for the arena: pages of 8 rank rows, and bias vectors. Offsets in the packed
tables count from the adapter's own first element. Prefix K and V become KV pages.
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
from peftserve_kernels.rank_pages import RANK_PAGE_ROWS, rank_pages

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
class _Part:
    """A matrix [r, n], [n, r] in the file if `turned`: blocks of `block_rows` rows from element `start` on."""

    start: int
    block_rows: int
    stored: _Stored
    turned: bool

    def rows(self) -> Floats:
        values = self.stored.float32()
        return values.T if self.turned else np.atleast_2d(values)


class _Packer:
    """Collects matrices that become pages; a page of `n` columns takes 8 n elements, rounded up to the alignment.

    What is added stays in the file until `finish`, and then is converted part by part.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._ends: list[int] = []

    def pages(self, stored: TensorView, *, turned: bool = False) -> list[int]:
        """Add a matrix [r, n], or [n, r] if `turned`, as pages of 8 rows; returns their offsets."""
        rows, columns = reversed(stored.shape) if turned else stored.shape
        return self._add(stored, turned, RANK_PAGE_ROWS, rows, columns)

    def vector(self, stored: _Stored) -> int:
        """Add [n] as a block of its own; returns its offset."""
        return self._add(stored, False, 1, 1, *stored.shape)[0]

    def finish(self, dtype: torch.dtype, *, values: Tables, offsets: Tables) -> PackedWeights:
        """The blocks in `dtype`, and the table rows. Raises `AdapterLoadError` when a weight exceeds its range."""
        data = torch.zeros(self._ends[-1], dtype=dtype)
        for part in self._parts:
            rows = part.rows()
            count, columns = -(-rows.shape[0] // part.block_rows), rows.shape[1]
            padded = np.zeros((count * part.block_rows, columns), np.float32)
            padded[: rows.shape[0]] = rows
            stride = align(part.block_rows * columns)
            blocks = data[part.start : part.start + count * stride].view(count, stride)
            blocks[:, : part.block_rows * columns] = torch.from_numpy(padded).view(count, -1)
        require_finite(data)
        return PackedWeights(data, tuple(self._ends), _tensors(values), _tensors(offsets))

    def _add(self, stored: _Stored, turned: bool, block_rows: int, rows: int, columns: int) -> list[int]:
        start = self._ends[-1] if self._ends else 0
        stride = align(block_rows * columns)
        offsets = [start + index * stride for index in range(-(-rows // block_rows))]
        self._parts.append(_Part(start, block_rows, stored, turned))
        self._ends += [offset + stride for offset in offsets]
        return offsets


def pack_lora(
    adapter: LoraAdapter, spec: ModelSpec, *, dtype: torch.dtype, max_rank: int, row_scales: RowScales | None
) -> PackedWeights:
    """A pages hold rows of A [r, in]; B pages hold rows of B^T [r, out]. A DoRA needs `row_scales`."""
    packer = _Packer()
    shape = (spec.num_layers, len(TARGET_NAMES))
    rank, scale = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    row_scale = np.full(shape, -1, np.int64)
    a_page, b_page = _no_pages(shape, max_rank), _no_pages(shape, max_rank)
    for where, module in sorted(adapter.modules.items()):
        rank[where], scale[where] = module.rank, module.scale
        used = rank_pages(module.rank)
        a_page[where][:used] = packer.pages(module.a)
        b_page[where][:used] = packer.pages(module.b, turned=True)
        if module.magnitude is not None:
            if row_scales is None:
                raise InternalError("a DoRA was to be loaded without the base's weights")
            row_scale[where] = packer.vector(row_scales.of(*where, module, module.magnitude))
    return packer.finish(
        dtype,
        values={"rank": rank, "scale": scale},
        offsets={"row_scale": row_scale, "a_page": a_page, "b_page": b_page},
    )


def pack_bottleneck(adapter: BottleneckAdapter, spec: ModelSpec, *, dtype: torch.dtype, max_rank: int) -> PackedWeights:
    """Down pages hold rows of W_down [w, hidden]; up pages hold rows of W_up^T [w, hidden]."""
    packer = _Packer()
    shape = (spec.num_layers, NUM_SITES)
    width, scale = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    down_page, up_page = _no_pages(shape, max_rank), _no_pages(shape, max_rank)
    down_bias, up_bias = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    for where, module in sorted(adapter.sites.items()):
        width[where], scale[where] = module.width, module.scale
        used = rank_pages(module.width)
        down_page[where][:used] = packer.pages(module.down)
        up_page[where][:used] = packer.pages(module.up, turned=True)
        down_bias[where] = packer.vector(module.down_bias)
        up_bias[where] = packer.vector(module.up_bias)
    activation = np.array(Activation[adapter.activation.value.upper()], np.int32)
    input_mode = np.array(BottleneckInput[adapter.input_mode.name], np.int32)
    return packer.finish(
        dtype,
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
