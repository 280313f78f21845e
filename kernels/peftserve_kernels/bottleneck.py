"""bottleneck_add: the bottleneck adapters of a batch, after a sublayer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.activation import Activation, activate
from peftserve_kernels.cpu import bottleneck as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op
from peftserve_kernels.rank_pages import read_factors, read_vector
from peftserve_kernels.segments import Segments
from peftserve_kernels.zeros import zeros

NUM_SITES: Final = 2


class BottleneckSite(IntEnum):
    """Where in a layer an adapter sits: after attention (AdapterHub's mh_adapter) or after the FFN (output_adapter)."""

    ATTENTION = 0
    FFN = 1


class BottleneckInput(IntEnum):
    """z, what an adapter reads: the sublayer's output h, h + r with the stream r before the sublayer, or r."""

    HIDDEN = 0  # Houlsby
    HIDDEN_PLUS_RESIDUAL = 1  # Pfeiffer, AdapterPlus
    RESIDUAL = 2  # parallel


@dataclass(frozen=True, eq=False, slots=True)
class BottleneckWeights:
    """All resident bottleneck adapters: one arena of rank pages (see `rank_pages`) and tables of what lies where.

    arena: model dtype, float32 or int8 [E]. width: int32, scale: float32, both [slots, layers, 2], by `BottleneckSite`;
    width 0: no adapter there. down_page, up_page: int64 [slots, layers, 2, P], element offsets of the pages of W_down
    (rows [8, D]) and of W_up transposed (rows [8, D]); P = ceil(max width / 8). down_bias, up_bias: int64 [slots,
    layers, 2], element offsets of b_down [width] and b_up [D]. activation: int32 [slots], an `Activation`;
    input_mode: int32 [slots], a `BottleneckInput`. The tables are filled and cleared in place as adapters come and
    go.
    Raises ValueError for shapes that do not agree.
    """

    arena: Tensor
    width: Tensor
    scale: Tensor
    down_page: Tensor
    up_page: Tensor
    down_bias: Tensor
    up_bias: Tensor
    activation: Tensor
    input_mode: Tensor

    def __post_init__(self) -> None:
        table = tuple(self.width.shape)
        if self.arena.ndim != 1 or len(table) != 3 or table[2] != NUM_SITES:
            raise ValueError(f"arena must be [E], width [slots, layers, 2]: {self.arena.ndim}-d and {list(table)}")
        for name in ("scale", "down_bias", "up_bias"):
            if tuple(getattr(self, name).shape) != table:
                raise ValueError(f"{name}: must be {list(table)} like width, got {list(getattr(self, name).shape)}")
        if self.down_page.shape != self.up_page.shape or tuple(self.down_page.shape[:-1]) != table:
            shapes = f"{list(self.down_page.shape)} and {list(self.up_page.shape)}"
            raise ValueError(f"down_page, up_page: must be {[*table, 'P']}, got {shapes}")
        for name in ("activation", "input_mode"):
            if tuple(getattr(self, name).shape) != table[:1]:
                raise ValueError(f"{name}: must be [{table[0]}], got {list(getattr(self, name).shape)}")

    @classmethod
    def empty(
        cls,
        *,
        elements: int,
        slots: int,
        layers: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "BottleneckWeights":
        """An arena of `elements` values and tables in which no slot holds an adapter (width 0 everywhere)."""
        table = (slots, layers, NUM_SITES)
        return cls(
            arena=zeros((elements,), dtype, device),
            width=zeros(table, torch.int32, device),
            scale=zeros(table, torch.float32, device),
            down_page=zeros((*table, pages), torch.int64, device),
            up_page=zeros((*table, pages), torch.int64, device),
            down_bias=zeros(table, torch.int64, device),
            up_bias=zeros(table, torch.int64, device),
            activation=zeros((slots,), torch.int32, device),
            input_mode=zeros((slots,), torch.int32, device),
        )


def bottleneck_add(
    stream: Tensor,
    hidden: Tensor,
    residual: Tensor,
    segments: Segments,
    weights: BottleneckWeights,
    layer: int,
    site: int,
) -> None:
    """For each segment: stream[s:e] += scale * (W_up f(W_down z + b_down) + b_up).

    Houlsby et al. 2019, arXiv:1902.00751. stream: float32 [M, D], written in place; it already holds residual +
    hidden. hidden: [M, D], the sublayer's output h. residual: float32 [M, D], the stream r before h was added. z is
    h, h + r or r, by the slot's `BottleneckInput`: that covers AdapterHub's sequential (Houlsby, Pfeiffer) and
    parallel configs. All in float32. Tokens outside all segments and sites of width 0 are not touched.
    Raises ValueError when the three activations differ in shape, stream is not float32, or the site is unknown.
    """
    if not segments:
        return
    if stream.dtype != torch.float32:
        raise ValueError(f"stream: must be float32, got {stream.dtype}")
    if not stream.shape == hidden.shape == residual.shape:
        shapes = f"{list(stream.shape)}, {list(hidden.shape)}, {list(residual.shape)}"
        raise ValueError(f"stream, hidden and residual must have one shape, got {shapes}")
    select(_IMPLEMENTATIONS, stream.device)(stream, hidden, residual, segments, weights, layer, BottleneckSite(site))


def bottleneck_add_reference(
    stream: Tensor,
    hidden: Tensor,
    residual: Tensor,
    segments: Segments,
    weights: BottleneckWeights,
    layer: int,
    site: int,
) -> None:
    """Two float32 linear layers a segment."""
    arena, size = weights.arena, stream.shape[1]
    for start, end, slot in segments.bounds:
        at = (slot, layer, site)
        width = int(weights.width[at])
        if width == 0:
            continue
        z = _input(BottleneckInput(int(weights.input_mode[slot])), hidden[start:end], residual[start:end])
        pages = weights.down_page[at].tolist(), weights.up_page[at].tolist()
        down, up = read_factors(arena, *pages, width, (size, size))
        inner = functional.linear(z, down, read_vector(arena, int(weights.down_bias[at]), width))
        inner = activate(Activation(int(weights.activation[slot])), inner)
        delta = torch.addmm(read_vector(arena, int(weights.up_bias[at]), size), inner, up)
        stream[start:end].add_(delta, alpha=float(weights.scale[at]))


def _input(mode: BottleneckInput, hidden: Tensor, residual: Tensor) -> Tensor:
    match mode:
        case BottleneckInput.HIDDEN:
            return hidden.float()
        case BottleneckInput.HIDDEN_PLUS_RESIDUAL:
            return hidden.float() + residual
        case BottleneckInput.RESIDUAL:
            return residual


_BottleneckAdd = Callable[[Tensor, Tensor, Tensor, Segments, BottleneckWeights, int, int], None]
_IMPLEMENTATIONS: Final[Mapping[Backend, _BottleneckAdd]] = {
    Backend.REFERENCE: bottleneck_add_reference,
    **native(cpu.bottleneck_add),
    **triton_op("bottleneck", "bottleneck_add"),
}
