"""lora_add in C++: all segments and slices of a call at once, to each adapter's real rank."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from peftserve_kernels.cpu.extension import ARENA_DTYPES, DTYPES, ops
from peftserve_kernels.cpu.threads import threads
from peftserve_kernels.segments import Segments

if TYPE_CHECKING:
    from peftserve_kernels.lora import LoraSlice, LoraWeights


def lora_add(
    y: Tensor, x: Tensor, segments: Segments, weights: "LoraWeights", layer: int, slices: Sequence["LoraSlice"]
) -> None:
    """See `peftserve_kernels.lora_add`. The tables must be contiguous. A token's bits depend on that token alone.

    Raises ValueError when y is not contiguous or x has another dtype.
    """
    if x.dtype != y.dtype or not y.is_contiguous():
        raise ValueError(f"y must be contiguous and of x's dtype: {y.dtype}, strides {list(y.stride())}; x {x.dtype}")
    tokens, columns = x.shape
    x = x.contiguous()
    _, layers, targets, pages = weights.a_page.shape
    ops.lora_add(
        y.data_ptr(),
        x.data_ptr(),
        segments.start.data_ptr(),
        segments.slot.data_ptr(),
        weights.arena.data_ptr(),
        weights.rank.data_ptr(),
        weights.scale.data_ptr(),
        weights.row_scale.data_ptr(),
        weights.a_page.data_ptr(),
        weights.b_page.data_ptr(),
        slices,
        DTYPES[y.dtype],
        ARENA_DTYPES[weights.arena.dtype],
        tokens,
        columns,
        y.shape[1],
        len(segments),
        layer,
        layers,
        targets,
        pages,
        threads(),
    )
