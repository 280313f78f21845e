"""bottleneck_add in C++: all segments of a call at once, in float32."""

from typing import TYPE_CHECKING

from torch import Tensor

from peftserve_kernels.cpu.extension import ARENA_DTYPES, DTYPES, ops
from peftserve_kernels.cpu.threads import threads
from peftserve_kernels.segments import Segments

if TYPE_CHECKING:
    from peftserve_kernels.bottleneck import BottleneckWeights


def bottleneck_add(
    stream: Tensor,
    hidden: Tensor,
    residual: Tensor,
    segments: Segments,
    weights: "BottleneckWeights",
    layer: int,
    site: int,
) -> None:
    """See `peftserve_kernels.bottleneck_add`. The tables must be contiguous. A token's bits depend on it alone.

    Raises ValueError when stream is not contiguous.
    """
    if not stream.is_contiguous():
        raise ValueError(f"stream: must be contiguous, got strides {list(stream.stride())}")
    tokens, columns = stream.shape
    hidden, residual = hidden.contiguous(), residual.float().contiguous()
    _, layers, _, pages = weights.down_page.shape
    ops.bottleneck_add(
        stream.data_ptr(),
        hidden.data_ptr(),
        residual.data_ptr(),
        segments.start.data_ptr(),
        segments.slot.data_ptr(),
        weights.arena.data_ptr(),
        weights.width.data_ptr(),
        weights.scale.data_ptr(),
        weights.down_page.data_ptr(),
        weights.up_page.data_ptr(),
        weights.down_bias.data_ptr(),
        weights.up_bias.data_ptr(),
        weights.activation.data_ptr(),
        weights.input_mode.data_ptr(),
        DTYPES[hidden.dtype],
        ARENA_DTYPES[weights.arena.dtype],
        tokens,
        columns,
        len(segments),
        layer,
        int(site),
        layers,
        pages,
        threads(),
    )
