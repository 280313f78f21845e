"""lora_add: the low-rank updates of many LoRA adapters in one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from peftserve_kernels.cpu import lora as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op
from peftserve_kernels.rank_pages import read_factors, read_vector
from peftserve_kernels.segments import Segments
from peftserve_kernels.zeros import zeros


@dataclass(frozen=True, eq=False, slots=True)
class LoraWeights:
    """All resident LoRA adapters: one arena of rank pages (see `rank_pages`) and tables that say what lies where.

    arena: model dtype, float32 or int8 [E]. rank: int32, scale: float32, both [slots, layers, targets]. a_page, b_page:
    int64 [slots, layers, targets, P], element offsets in the arena of the pages of A (rows [8, in]) and of B transposed
    (rows [8, out]), multiples of 8; P = ceil(max rank / 8); entries past ceil(rank / 8) are not read. row_scale: int64
    [slots, layers, targets], the element offset, a multiple of 8, of [2, out] values, or -1 for none: g - 1 for DoRA's
    row scale g, which is near 1, so that 16 bits keep what g would lose; and (1 - g) b, which undoes what g does to the
    layer's bias b. Rank 0: the adapter does not touch that module, and none of its other entries is read. The tables
    are filled and cleared in place as adapters come and go.
    Raises ValueError for shapes that do not agree.
    """

    arena: Tensor
    rank: Tensor
    scale: Tensor
    row_scale: Tensor
    a_page: Tensor
    b_page: Tensor

    def __post_init__(self) -> None:
        table = tuple(self.rank.shape)
        if self.arena.ndim != 1 or len(table) != 3:
            raise ValueError(f"arena must be [E], rank [slots, layers, targets]: {self.arena.ndim}-d and {list(table)}")
        for name in ("scale", "row_scale"):
            if tuple(getattr(self, name).shape) != table:
                raise ValueError(f"{name}: must be {list(table)} like rank, got {list(getattr(self, name).shape)}")
        if self.a_page.shape != self.b_page.shape or tuple(self.a_page.shape[:-1]) != table:
            shapes = f"{list(self.a_page.shape)} and {list(self.b_page.shape)}"
            raise ValueError(f"a_page, b_page: must be {[*table, 'P']}, got {shapes}")

    @classmethod
    def empty(
        cls,
        *,
        elements: int,
        slots: int,
        layers: int,
        targets: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "LoraWeights":
        """An arena of `elements` values and tables in which no slot holds an adapter (rank 0 everywhere)."""
        table = (slots, layers, targets)
        return cls(
            arena=zeros((elements,), dtype, device),
            rank=zeros(table, torch.int32, device),
            scale=zeros(table, torch.float32, device),
            row_scale=torch.full(table, -1, dtype=torch.int64, device=device),
            a_page=zeros((*table, pages), torch.int64, device),
            b_page=zeros((*table, pages), torch.int64, device),
        )


class LoraSlice(NamedTuple):
    """One module in the output of a (merged) linear layer: columns out_offset .. out_offset + out_features of y.

    A tuple, which the native kernel reads in this order.
    """

    target: int
    in_features: int
    out_offset: int
    out_features: int


def lora_add(
    y: Tensor, x: Tensor, segments: Segments, weights: LoraWeights, layer: int, slices: Sequence[LoraSlice]
) -> None:
    """For each segment and slice: y[s:e, off:off+N] += scale * (x[s:e] A^T) B^T (Hu et al. 2021, arXiv:2106.09685).

    Where the module has a row scale g, and y holds W x + b, it will hold g * (W x + scale * B (A x)) + b: that is DoRA
    (Liu et al. 2024, arXiv:2402.09353) with g = m / ||W + scale B A|| by output row.

    y: [M, Ntot], written in place; x: [M, K], the layer's input; both float32, bfloat16 or float16. Runs to the real
    rank of each adapter and module. The rank-sized intermediate is float32, the sum is rounded once to y's dtype.
    Tokens outside all segments and modules of rank 0 are not touched.
    Raises ValueError when a slice does not fit x or y.
    """
    if not segments:
        return
    for piece in slices:
        if piece.in_features != x.shape[1] or piece.out_offset + piece.out_features > y.shape[1]:
            raise ValueError(f"{piece} does not fit x {list(x.shape)} and y {list(y.shape)}")
    select(_IMPLEMENTATIONS, y.device)(y, x, segments, weights, layer, slices)


def lora_add_reference(
    y: Tensor, x: Tensor, segments: Segments, weights: LoraWeights, layer: int, slices: Sequence[LoraSlice]
) -> None:
    """Two float32 products a segment and slice."""
    for start, end, slot in segments.bounds:
        ranks = weights.rank[slot, layer].tolist()
        scales = weights.scale[slot, layer].tolist()
        row_scales = weights.row_scale[slot, layer].tolist()
        a_pages = weights.a_page[slot, layer].tolist()
        b_pages = weights.b_page[slot, layer].tolist()
        inputs = x[start:end].float()
        for piece in slices:
            target, rank = piece.target, ranks[piece.target]
            if rank == 0:
                continue
            widths = piece.in_features, piece.out_features
            a, b = read_factors(weights.arena, a_pages[target], b_pages[target], rank, widths)
            out = y[start:end, piece.out_offset : piece.out_offset + piece.out_features]
            delta, row_scale = inputs @ a.t() @ b, row_scales[target]
            if row_scale < 0:
                out.add_(delta, alpha=scales[target])
            else:
                excess, shift = read_vector(weights.arena, row_scale, 2 * piece.out_features).chunk(2)
                updated = torch.add(out, delta, alpha=scales[target])
                out.copy_(updated + excess * updated + shift)


_LoraAdd = Callable[[Tensor, Tensor, Segments, LoraWeights, int, Sequence[LoraSlice]], None]
_IMPLEMENTATIONS: Final[Mapping[Backend, _LoraAdd]] = {
    Backend.REFERENCE: lora_add_reference,
    **native(cpu.lora_add),
    **triton_op("lora", "lora_add"),
}
