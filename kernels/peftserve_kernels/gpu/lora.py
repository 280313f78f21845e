"""lora_add in Triton: programs are tiles of the batch times pieces of the output columns of all slices.

Fused, one launch: a program shrinks its tokens to the adapter's rank, leaves that in a workspace of its own, and
expands it over its columns; programs of one tile repeat the shrink rather than wait for one another. In two launches,
the shrink is spread over column splits and rank rows first. Which of them runs changes no bit: both sum in one order.
"""

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.device import rounded
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
from peftserve_kernels.lora import LoraSlice, LoraWeights
from peftserve_kernels.segments import TILE_TOKENS, Segments

SPLIT_COLUMNS: Final = 4096
"""Columns of x whose products are summed before the sums are: fixed, so that a token's sum has one order."""

# By (backend, least arch, dtype of the weights): the first row that applies. Eight warps rather than four with twice
# the columns: half the chain of products a warp, and no kernel near its limit of registers. With float16 t meets B
# in TF32 (`dot_wide`), operands twice as wide: 256 columns spill on sm_90, 128 on sm_80. With int8, which is widened
# first, they spill on sm_100.
_TUNING: Final = (
    (("cuda", 100, torch.bfloat16), Tuning(32, 256, 8, 4, 148)),
    (("cuda", 100, torch.int8), Tuning(32, 128, 8, 4, 148)),
    (("cuda", 90, torch.bfloat16), Tuning(32, 256, 8, 4, 132)),
    (("cuda", 90, torch.int8), Tuning(32, 128, 8, 4, 132)),
    (("cuda", 0, torch.bfloat16), Tuning(32, 256, 8, 4, 108)),
    (("cuda", 0, torch.int8), Tuning(32, 128, 8, 4, 108)),
    (("cuda", 100, torch.float16), Tuning(32, 128, 8, 4, 148)),
    (("cuda", 90, torch.float16), Tuning(32, 128, 8, 4, 132)),
    (("cuda", 0, torch.float16), Tuning(32, 256, 8, 4, 108)),
    (("cuda", 100, torch.float32), Tuning(16, 64, 8, 3, 148)),
    (("cuda", 90, torch.float32), Tuning(16, 64, 8, 3, 132)),
    (("cuda", 0, torch.float32), Tuning(16, 64, 8, 3, 108)),
    (("hip", 0, torch.bfloat16), Tuning(64, 256, 4, 2, 304)),
    (("hip", 0, torch.int8), Tuning(64, 256, 4, 2, 304)),
    (("hip", 0, torch.float16), Tuning(64, 256, 4, 2, 304)),
    (("hip", 0, torch.float32), Tuning(32, 128, 4, 2, 304)),
)


def choose(
    target: Target, dtype: torch.dtype, *, tiles: int, pages: int, in_features: int, widths: Sequence[int]
) -> Choice:
    """The launches for an arena of `dtype`, `pages` rank pages at most, and slices of `widths` output columns."""
    splits = -(-in_features // SPLIT_COLUMNS)
    tuning = tuning_for(_TUNING, target, dtype)
    return choose_launches(target, tuning, tiles, pages, in_features, widths, splits)


@triton.constexpr_function
def _pieces_before(slices: Sequence[tuple[int, int, int, int]], index: int, columns: int) -> int:
    return sum(-(-piece[3] // columns) for piece in slices[:index])


@triton.jit
def _piece(item, SLICES: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The program's output columns: (index, target, offset in y and width of their slice, their first in it)."""
    index, start, target, offset, width = 0, 0, 0, 0, 0
    for i in tl.static_range(len(SLICES)):
        is_here = item >= _pieces_before(SLICES, i, COLUMNS)
        index = tl.where(is_here, i, index)
        start = tl.where(is_here, _pieces_before(SLICES, i, COLUMNS), start)
        target = tl.where(is_here, SLICES[i][0], target)
        offset = tl.where(is_here, SLICES[i][2], offset)
        width = tl.where(is_here, SLICES[i][3], width)
    return index, target, offset, width, (item - start) * COLUMNS


@triton.jit
def _shrink_to(  # type: ignore[no-untyped-def]
    inner_ptr,
    x_ptr,
    x_stride,
    first,
    end,
    arena_ptr,
    page_ptr,
    rank,
    rank_begin,
    split_begin,
    split_end,
    in_features,
    SPLIT_COLUMNS: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """Store the sum, in order, of splits split_begin .. split_end of x A^T for rank rows rank_begin ... ."""
    inner = tl.zeros((TOKENS, RANK_STEP), tl.float32)
    for split in range(split_begin, split_end):
        begin = split * SPLIT_COLUMNS
        stop = tl.minimum(begin + SPLIT_COLUMNS, in_features)
        # fmt: off
        inner += shrink(
            x_ptr, x_stride, x_ptr, 0, first, end, arena_ptr, page_ptr, rank, rank_begin, begin, stop, in_features,
            stop, 0, False, BLOCK_K, WARPS, TF32,
        )
        # fmt: on
    if arena_ptr.dtype.element_ty == tl.int8:
        rows = rank_begin + tl.arange(0, RANK_STEP)
        inner *= row_scales(arena_ptr, page_ptr, rows, rank, True)[None, :]
    tl.store(inner_ptrs(inner_ptr, rank_begin, RANK_ROOM), inner)


@triton.jit
def _expand_into(  # type: ignore[no-untyped-def]
    y_ptr,
    y_stride,
    scale,
    row_scale,
    first,
    end,
    inner_ptr,
    splits,
    arena_ptr,
    page_ptr,
    rank,
    offset,
    width,
    begin,
    RANK_ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TF32: tl.constexpr,
):
    """Columns begin .. begin + COLUMNS of a slice: y = g (y + scale t B) + c, or without g and c where row_scale is
    negative.

    The arena holds g - 1, and then c.
    """
    tokens = first + tl.arange(0, TOKENS)
    rows = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + offset
    excess_ptr = vector_ptr(arena_ptr, row_scale)
    scaled = tl.where(row_scale < 0, 0, width)
    for block in range(begin, tl.minimum(begin + COLUMNS, width), BLOCK_N):
        columns = block + tl.arange(0, BLOCK_N)
        is_column = columns < width
        is_here = (tokens < end)[:, None] & is_column[None, :]
        # asked for first, so that it arrives while the product is made
        y = tl.load(rows + columns[None, :], mask=is_here)
        excess = tl.load(excess_ptr + columns, mask=columns < scaled, other=0.0).to(tl.float32)
        shift = tl.load(excess_ptr + width + columns, mask=columns < scaled, other=0.0).to(tl.float32)
        delta = expand(inner_ptr, splits, arena_ptr, page_ptr, rank, columns, width, RANK_ROOM, BLOCK_N, TF32)
        y = y.to(tl.float32) + scale * delta
        y += excess[None, :] * y + shift[None, :]
        tl.store(rows + columns[None, :], rounded(y, y_ptr.dtype.element_ty), mask=is_here)


@triton.jit(do_not_specialize=["layer"])
def lora_add_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    inner_ptr,
    tiles_ptr,
    arena_ptr,
    rank_ptr,
    a_page_ptr,
    y_ptr,
    y_stride,
    scale_ptr,
    row_scale_ptr,
    b_page_ptr,
    in_features,
    layer,
    layers,
    targets,
    pages,
    SLICES: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """Both products for one tile and COLUMNS of one slice; inner: float32 [tiles, pieces, 16, RANK_ROOM]."""
    tile, item = tl.program_id(0), tl.program_id(1)
    first, end, slot = tile_at(tiles_ptr, tile)
    if first >= end:
        return
    _, target, offset, width, begin = _piece(item, SLICES, COLUMNS)
    table = (slot * layers + layer) * targets + target
    rank = tl.load(rank_ptr + table)
    if rank == 0:
        return
    part = (tile * tl.num_programs(1) + item).to(tl.int64)
    inner_ptr += part * (TOKENS * RANK_ROOM)
    splits = tl.cdiv(in_features, SPLIT_COLUMNS)
    for rank_begin in range(0, rank, RANK_STEP):
        # fmt: off
        _shrink_to(
            inner_ptr, x_ptr, x_stride, first, end, arena_ptr, a_page_ptr + table * pages, rank, rank_begin, 0, splits,
            in_features, SPLIT_COLUMNS, RANK_ROOM, BLOCK_K, WARPS, TF32,
        )
        # fmt: on
    # The program's threads read what others of them wrote.
    tl.debug_barrier()
    # fmt: off
    _expand_into(
        y_ptr, y_stride, tl.load(scale_ptr + table), tl.load(row_scale_ptr + table), first, end, inner_ptr, 1,
        arena_ptr, b_page_ptr + table * pages, rank, offset, width, begin, RANK_ROOM, COLUMNS, BLOCK_N, TF32,
    )
    # fmt: on


@triton.jit(do_not_specialize=["layer"])
def lora_shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    inner_ptr,
    tiles_ptr,
    arena_ptr,
    rank_ptr,
    a_page_ptr,
    in_features,
    layer,
    layers,
    targets,
    pages,
    SLICES: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """x A^T for one tile, slice and column split, and every so manyth block of rank rows.

    inner: float32 [tiles, slices, splits, 16, RANK_ROOM].
    """
    tile, item = tl.program_id(0), tl.program_id(1)
    first, end, slot = tile_at(tiles_ptr, tile)
    if first >= end:
        return
    splits = tl.cdiv(in_features, SPLIT_COLUMNS)
    split = item % splits
    target = 0
    for i in tl.static_range(len(SLICES)):
        target = tl.where(item // splits == i, SLICES[i][0], target)
    table = (slot * layers + layer) * targets + target
    rank = tl.load(rank_ptr + table)
    part = (tile * tl.num_programs(1) + item).to(tl.int64)
    for rank_begin in range(tl.program_id(2) * RANK_STEP, rank, tl.num_programs(2) * RANK_STEP):
        # fmt: off
        _shrink_to(
            inner_ptr + part * (TOKENS * RANK_ROOM), x_ptr, x_stride, first, end, arena_ptr, a_page_ptr + table * pages,
            rank, rank_begin, split, split + 1, in_features, SPLIT_COLUMNS, RANK_ROOM, BLOCK_K, WARPS, TF32,
        )
        # fmt: on


@triton.jit(do_not_specialize=["layer"])
def lora_expand_kernel(  # type: ignore[no-untyped-def]
    inner_ptr,
    tiles_ptr,
    arena_ptr,
    rank_ptr,
    y_ptr,
    y_stride,
    scale_ptr,
    row_scale_ptr,
    b_page_ptr,
    in_features,
    layer,
    layers,
    targets,
    pages,
    SLICES: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TF32: tl.constexpr,
):
    """What `lora_shrink_kernel` left, times B, for one tile and COLUMNS of one slice."""
    tile = tl.program_id(0)
    first, end, slot = tile_at(tiles_ptr, tile)
    if first >= end:
        return
    index, target, offset, width, begin = _piece(tl.program_id(1), SLICES, COLUMNS)
    table = (slot * layers + layer) * targets + target
    rank = tl.load(rank_ptr + table)
    if rank == 0:
        return
    splits = tl.cdiv(in_features, SPLIT_COLUMNS)
    part = (tile * len(SLICES) + index).to(tl.int64) * splits
    # fmt: off
    _expand_into(
        y_ptr, y_stride, tl.load(scale_ptr + table), tl.load(row_scale_ptr + table), first, end,
        inner_ptr + part * (TOKENS * RANK_ROOM), splits, arena_ptr, b_page_ptr + table * pages, rank, offset, width,
        begin, RANK_ROOM, COLUMNS, BLOCK_N, TF32,
    )
    # fmt: on


def lora_add(
    y: Tensor, x: Tensor, segments: Segments, weights: LoraWeights, layer: int, slices: Sequence[LoraSlice]
) -> None:
    """See `peftserve_kernels.lora_add`. The tables must be contiguous. A token's bits depend on that token alone.

    16-bit x and A are multiplied as they are, with float32 sums; t = x A^T meets a 16-bit B as two summands of its
    width, 16 bits together with bfloat16 and 21 with float16.
    Raises ValueError when the columns of y are not adjacent.
    """
    if y.shape[1] > 1 and y.stride(1) != 1:
        raise ValueError(f"y: columns must be adjacent, got strides {list(y.stride())}")
    tiles, (_, layers, targets, pages) = segments.tiles.shape[0], weights.a_page.shape
    if not tiles or not slices or not pages:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    in_features, widths = x.shape[1], tuple(piece.out_features for piece in slices)
    target = current_target(y.device)
    choice = choose(target, weights.arena.dtype, tiles=tiles, pages=pages, in_features=in_features, widths=widths)
    tuning = choice.tuning
    pieces = num_pieces(widths, choice.columns)
    splits = -(-in_features // SPLIT_COLUMNS)
    rank_room = -(-pages // 2) * RANK_STEP.value
    parts = pieces if choice.fused else len(slices) * splits
    inner = torch.empty((tiles, parts, TILE_TOKENS, rank_room), dtype=torch.float32, device=y.device)
    tables = (segments.tiles, weights.arena, weights.rank, weights.a_page)
    sizes = (in_features, layer, layers, targets, pages)
    shrink_options = {
        "SLICES": tuple(tuple(piece) for piece in slices),
        "SPLIT_COLUMNS": SPLIT_COLUMNS,
        "RANK_ROOM": rank_room,
        "TF32": target.backend == "cuda",
    }
    expand_options = shrink_options | {"COLUMNS": choice.columns, "BLOCK_N": tuning.block_n}
    shrink_options |= {"BLOCK_K": tuning.block_k, "WARPS": tuning.num_warps}
    schedule = {"num_warps": tuning.num_warps, "num_stages": tuning.num_stages}
    outputs = (y, y.stride(0), weights.scale, weights.row_scale, weights.b_page)
    if choice.fused:
        options = shrink_options | expand_options
        launch(
            lora_add_kernel, (tiles, pieces), x, x.stride(0), inner, *tables, *outputs, *sizes, **options, **schedule
        )
        return
    grid: tuple[int, ...] = (tiles, len(slices) * splits, choice.rank_groups)
    launch(lora_shrink_kernel, grid, x, x.stride(0), inner, *tables, *sizes, **shrink_options, **schedule)
    grid = (tiles, pieces)
    launch(lora_expand_kernel, grid, inner, *tables[:3], *outputs, *sizes, **expand_options, **schedule)
