"""bottleneck_add in Triton: programs are tiles of the batch times pieces of the stream's columns.

As in `lora`: fused in one launch, where programs of one tile repeat the shrink, or in two, the first of which spreads
it over the width. Which of them runs changes no bit. A slot's activation and input are read on the device.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.bottleneck import NUM_SITES, BottleneckInput, BottleneckWeights
from peftserve_kernels.gpu.activation import activate
from peftserve_kernels.gpu.launch import Target, current_target, launch
from peftserve_kernels.gpu.low_rank import (
    RANK_STEP,
    TOKENS,
    Choice,
    Tuning,
    choose_launches,
    expand,
    inner_ptrs,
    num_pieces,
    row_scales,
    shrink,
    tile_at,
    tuning_for,
    vector_ptr,
)
from peftserve_kernels.segments import TILE_TOKENS, Segments

_SITES = tl.constexpr(NUM_SITES)
_HIDDEN = tl.constexpr(BottleneckInput.HIDDEN.value)
_RESIDUAL = tl.constexpr(BottleneckInput.RESIDUAL.value)

# With int8, which is widened first, blocks are smaller, so that there is room for two programs of eight warps on an SM.
_TUNING: Final = (
    (("cuda", 100, torch.bfloat16), Tuning(32, 256, 8, 3, 148)),
    (("cuda", 100, torch.int8), Tuning(16, 128, 8, 3, 148)),
    (("cuda", 90, torch.bfloat16), Tuning(32, 256, 8, 3, 132)),
    (("cuda", 90, torch.int8), Tuning(16, 128, 8, 3, 132)),
    (("cuda", 0, torch.bfloat16), Tuning(32, 256, 8, 3, 108)),
    (("cuda", 0, torch.int8), Tuning(16, 128, 8, 3, 108)),
    (("cuda", 100, torch.float16), Tuning(32, 256, 8, 3, 148)),
    (("cuda", 90, torch.float16), Tuning(32, 256, 8, 3, 132)),
    (("cuda", 0, torch.float16), Tuning(32, 256, 8, 3, 108)),
    (("cuda", 100, torch.float32), Tuning(16, 64, 8, 3, 148)),
    (("cuda", 90, torch.float32), Tuning(16, 64, 8, 3, 132)),
    (("cuda", 0, torch.float32), Tuning(16, 64, 8, 3, 108)),
    (("hip", 0, torch.bfloat16), Tuning(32, 256, 4, 2, 304)),
    (("hip", 0, torch.int8), Tuning(32, 256, 4, 2, 304)),
    (("hip", 0, torch.float16), Tuning(32, 256, 4, 2, 304)),
    (("hip", 0, torch.float32), Tuning(16, 128, 4, 2, 304)),
)


def choose(target: Target, dtype: torch.dtype, *, tiles: int, pages: int, columns: int) -> Choice:
    """The launches for an arena of `dtype`, `pages` rank pages at most, and a stream of `columns`."""
    return choose_launches(target, tuning_for(_TUNING, target, dtype), tiles, pages, columns, (columns,))


@triton.jit
def _shrink_to(  # type: ignore[no-untyped-def]
    inner_ptr,
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    first,
    end,
    arena_ptr,
    page_ptr,
    bias_ptr,
    kind,
    mode,
    width,
    rank_begin,
    columns,
    RANK_ROOM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """Store f(W_down z + b_down) for rows rank_begin ... of W_down; those past the width are stored but not used."""
    x_stop = tl.where(mode == _RESIDUAL, 0, columns)
    residual_stop = tl.where(mode == _HIDDEN, 0, columns)
    # fmt: off
    inner = shrink(
        hidden_ptr, hidden_stride, residual_ptr, residual_stride, first, end, arena_ptr, page_ptr, width, rank_begin,
        0, columns, columns, x_stop, residual_stop, True, BLOCK_K, WARPS, TF32,
    )
    # fmt: on
    rows = rank_begin + tl.arange(0, RANK_STEP)
    # Spread over the block by this load, so that what follows has the load's layout, with one thread a value: in that
    # of the sum, every warp has them all.
    at = tl.arange(0, TOKENS)[:, None] * 0 + rows[None, :]
    bias = tl.load(bias_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    inner = activate(kind, bias + inner)
    if arena_ptr.dtype.element_ty == tl.int8:
        inner *= row_scales(arena_ptr, page_ptr, rows, width, True)[None, :]
    tl.store(inner_ptrs(inner_ptr, rank_begin, RANK_ROOM), inner)


@triton.jit
def _expand_into(  # type: ignore[no-untyped-def]
    stream_ptr,
    stream_stride,
    scale,
    first,
    end,
    inner_ptr,
    arena_ptr,
    page_ptr,
    bias_ptr,
    width,
    begin,
    columns,
    RANK_ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TF32: tl.constexpr,
):
    """Columns begin .. begin + COLUMNS: stream += scale (W_up inner + b_up)."""
    tokens = first + tl.arange(0, TOKENS)
    rows = stream_ptr + tokens.to(tl.int64)[:, None] * stream_stride
    for block in range(begin, tl.minimum(begin + COLUMNS, columns), BLOCK_N):
        column = block + tl.arange(0, BLOCK_N)
        is_here = (tokens < end)[:, None] & (column < columns)[None, :]
        # asked for first, so that it arrives while the product is made
        stream = tl.load(rows + column[None, :], mask=is_here)
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        delta = expand(inner_ptr, 1, arena_ptr, page_ptr, width, column, columns, RANK_ROOM, BLOCK_N, TF32)
        tl.store(rows + column[None, :], stream + scale * (delta + bias[None, :]), mask=is_here)


@triton.jit(do_not_specialize=["layer", "site"])
def bottleneck_add_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    inner_ptr,
    tiles_ptr,
    arena_ptr,
    width_ptr,
    down_page_ptr,
    down_bias_ptr,
    activation_ptr,
    input_mode_ptr,
    stream_ptr,
    stream_stride,
    scale_ptr,
    up_page_ptr,
    up_bias_ptr,
    columns,
    layer,
    layers,
    site,
    pages,
    RANK_ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """Both layers for one tile and COLUMNS columns; inner: float32 [tiles, pieces, 16, RANK_ROOM]."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    first, end, slot = tile_at(tiles_ptr, tile)
    if first >= end:
        return
    table = (slot * layers + layer) * _SITES + site
    width = tl.load(width_ptr + table)
    if width == 0:
        return
    part = (tile * tl.num_programs(1) + piece).to(tl.int64)
    inner_ptr += part * (TOKENS * RANK_ROOM)
    kind, mode = tl.load(activation_ptr + slot), tl.load(input_mode_ptr + slot)
    bias_ptr = vector_ptr(arena_ptr, tl.load(down_bias_ptr + table))
    for rank_begin in range(0, width, RANK_STEP):
        # fmt: off
        _shrink_to(
            inner_ptr, hidden_ptr, hidden_stride, residual_ptr, residual_stride, first, end, arena_ptr,
            down_page_ptr + table * pages, bias_ptr, kind, mode, width, rank_begin, columns,
            RANK_ROOM, BLOCK_K, WARPS, TF32,
        )
        # fmt: on
    # The program's threads read what others of them wrote.
    tl.debug_barrier()
    bias_ptr = vector_ptr(arena_ptr, tl.load(up_bias_ptr + table))
    # fmt: off
    _expand_into(
        stream_ptr, stream_stride, tl.load(scale_ptr + table), first, end, inner_ptr, arena_ptr,
        up_page_ptr + table * pages, bias_ptr, width, piece * COLUMNS, columns, RANK_ROOM, COLUMNS, BLOCK_N, TF32,
    )
    # fmt: on


@triton.jit(do_not_specialize=["layer", "site"])
def bottleneck_shrink_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    inner_ptr,
    tiles_ptr,
    arena_ptr,
    width_ptr,
    down_page_ptr,
    down_bias_ptr,
    activation_ptr,
    input_mode_ptr,
    columns,
    layer,
    layers,
    site,
    pages,
    RANK_ROOM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """f(W_down z + b_down) for one tile and its share of the width; inner: float32 [tiles, 16, RANK_ROOM]."""
    tile = tl.program_id(0)
    first, end, slot = tile_at(tiles_ptr, tile)
    if first >= end:
        return
    table = (slot * layers + layer) * _SITES + site
    width = tl.load(width_ptr + table)
    kind, mode = tl.load(activation_ptr + slot), tl.load(input_mode_ptr + slot)
    bias_ptr = vector_ptr(arena_ptr, tl.load(down_bias_ptr + table))
    for rank_begin in range(tl.program_id(1) * RANK_STEP, width, tl.num_programs(1) * RANK_STEP):
        # fmt: off
        _shrink_to(
            inner_ptr + tile.to(tl.int64) * (TOKENS * RANK_ROOM), hidden_ptr, hidden_stride, residual_ptr,
            residual_stride, first, end, arena_ptr, down_page_ptr + table * pages, bias_ptr, kind, mode, width,
            rank_begin, columns, RANK_ROOM, BLOCK_K, WARPS, TF32,
        )
        # fmt: on


@triton.jit(do_not_specialize=["layer", "site"])
def bottleneck_expand_kernel(  # type: ignore[no-untyped-def]
    inner_ptr,
    tiles_ptr,
    arena_ptr,
    width_ptr,
    stream_ptr,
    stream_stride,
    scale_ptr,
    up_page_ptr,
    up_bias_ptr,
    columns,
    layer,
    layers,
    site,
    pages,
    RANK_ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TF32: tl.constexpr,
):
    """What `bottleneck_shrink_kernel` left, times W_up, for one tile and COLUMNS columns."""
    tile = tl.program_id(0)
    first, end, slot = tile_at(tiles_ptr, tile)
    if first >= end:
        return
    table = (slot * layers + layer) * _SITES + site
    width = tl.load(width_ptr + table)
    if width == 0:
        return
    bias_ptr = vector_ptr(arena_ptr, tl.load(up_bias_ptr + table))
    # fmt: off
    _expand_into(
        stream_ptr, stream_stride, tl.load(scale_ptr + table), first, end,
        inner_ptr + tile.to(tl.int64) * (TOKENS * RANK_ROOM), arena_ptr, up_page_ptr + table * pages, bias_ptr, width,
        tl.program_id(1) * COLUMNS, columns, RANK_ROOM, COLUMNS, BLOCK_N, TF32,
    )
    # fmt: on


def bottleneck_add(
    stream: Tensor,
    hidden: Tensor,
    residual: Tensor,
    segments: Segments,
    weights: BottleneckWeights,
    layer: int,
    site: int,
) -> None:
    """See `peftserve_kernels.bottleneck_add`. The tables must be contiguous. A token's bits depend on it alone.

    z and the inner activations are float32; each meets 16-bit weights as two summands of their width, 16 bits together
    with bfloat16 and 21 with float16.
    Raises ValueError when the columns of stream are not adjacent.
    """
    columns = stream.shape[1]
    if columns > 1 and stream.stride(1) != 1:
        raise ValueError(f"stream: columns must be adjacent, got strides {list(stream.stride())}")
    tiles, (_, layers, _, pages) = segments.tiles.shape[0], weights.down_page.shape
    if not tiles or not pages or not columns:
        return
    hidden, residual = hidden.contiguous(), residual.float().contiguous()
    target = current_target(stream.device)
    choice = choose(target, weights.arena.dtype, tiles=tiles, pages=pages, columns=columns)
    tuning = choice.tuning
    pieces = num_pieces((columns,), choice.columns)
    rank_room = -(-pages // 2) * RANK_STEP.value
    parts = pieces if choice.fused else 1
    inner = torch.empty((tiles, parts, TILE_TOKENS, rank_room), dtype=torch.float32, device=stream.device)
    tables = (segments.tiles, weights.arena, weights.width)
    down = (weights.down_page, weights.down_bias, weights.activation, weights.input_mode)
    inputs = (hidden, columns, residual, columns, inner, *tables, *down)
    outputs = (stream, stream.stride(0), weights.scale, weights.up_page, weights.up_bias)
    sizes = (columns, layer, layers, int(site), pages)
    common = {"RANK_ROOM": rank_room, "TF32": target.backend == "cuda"}
    shrink_options = {"BLOCK_K": tuning.block_k, "WARPS": tuning.num_warps} | common
    expand_options = {"COLUMNS": choice.columns, "BLOCK_N": tuning.block_n} | common
    schedule = {"num_warps": tuning.num_warps, "num_stages": tuning.num_stages}
    if choice.fused:
        options = shrink_options | expand_options
        launch(bottleneck_add_kernel, (tiles, pieces), *inputs, *outputs, *sizes, **options, **schedule)
        return
    launch(bottleneck_shrink_kernel, (tiles, choice.rank_groups), *inputs, *sizes, **shrink_options, **schedule)
    launch(bottleneck_expand_kernel, (tiles, pieces), inner, *tables, *outputs, *sizes, **expand_options, **schedule)
