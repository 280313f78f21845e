"""Products with low-rank factors in rank pages (see `peftserve_kernels.rank_pages`), for LoRA and bottleneck adapters.

A program takes one tile, at most 16 tokens of one segment, always as the 16 rows of its tensor-core products: what is
computed for a token depends on nothing but that token. shrink: t = x A^T, columns in chunks of `num_warps` times
BLOCK_K; each warp sums its own part of every chunk, and the warps' sums are added at the end, so that no sum waits for
a chain of products as long as the row. expand: t B, rank rows ascending. Rows of 8 bits are multiplied as the 16-bit
values that they are exactly, and t by the scales.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from peftserve_kernels.gpu.device import dot, from_int8, rounded
from peftserve_kernels.gpu.launch import Target
from peftserve_kernels.rank_pages import RANK_PAGE_ROWS, SCALES_ELEMENTS
from peftserve_kernels.segments import TILE_TOKENS

TOKENS = tl.constexpr(TILE_TOKENS)
RANK_STEP = tl.constexpr(16)
"""Rank rows taken at once: two pages, and the depth of a 16-bit tensor-core product."""
_PAGE_ROWS = tl.constexpr(RANK_PAGE_ROWS)
_SCALES_ELEMENTS = tl.constexpr(SCALES_ELEMENTS)

_FUSED_WEIGHTS: Final = 1 << 18
"""The most weights that a program may read again, so that its output columns need no second launch.

At full rank (64 of 4096 columns) that is about 5 us of one SM's path to the L2; most adapters have a quarter of it.
"""


_UNALIGNED_BLOCK_N: Final = 64


class Tuning(NamedTuple):
    """Block sizes and launch options; `programs`: how many occupy the whole device."""

    block_k: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


TuningTable = Sequence[tuple[tuple[str, int, torch.dtype], Tuning]]


class Choice(NamedTuple):
    """How a call is launched. columns: those of one program; rank_groups: programs over which rank rows are spread."""

    tuning: Tuning
    fused: bool
    columns: int
    rank_groups: int


def tuning_for(table: TuningTable, target: Target, dtype: torch.dtype) -> Tuning:
    """The first row of `table`, by (backend, least arch, dtype of the weights), that applies."""
    arch = target.arch if isinstance(target.arch, int) else 0
    wanted = target.backend, dtype
    return next(row for (backend, least, kind), row in table if (backend, kind) == wanted and least <= arch)


def choose_launches(
    target: Target, tuning: Tuning, tiles: int, pages: int, in_features: int, widths: Sequence[int], splits: int = 1
) -> Choice:
    """One launch or two, for adapters of up to `pages` rank pages and outputs of `widths` columns.

    One, unless few tiles would leave long products to few programs: those are then spread over the device first.
    """
    if any(size % 16 for size in (in_features, *widths)):
        # Rows that are not aligned are read value by value, and every value takes an address.
        tuning = tuning._replace(block_n=min(tuning.block_n, _UNALIGNED_BLOCK_N))
    shrinks = tiles * len(widths)
    is_short = pages * RANK_PAGE_ROWS * in_features <= _FUSED_WEIGHTS
    # A barrier of ROCm's Triton orders local memory only, so there no program may read what it wrote.
    fused = target.backend == "cuda" and (is_short or shrinks >= tuning.programs)
    columns = max(triton.next_power_of_2(max(widths)), tuning.block_n)
    # Where programs repeat the shrink, no more than occupy the device; else some to spare, for they end unevenly.
    wanted = tuning.programs * (1 if fused else 4)
    while columns > tuning.block_n and tiles * num_pieces(widths, columns) < wanted:
        columns //= 2
    return Choice(tuning, fused, columns, -(-pages // 2) if shrinks * splits < tuning.programs else 1)


def num_pieces(widths: Sequence[int], columns: int) -> int:
    """Programs a tile when each takes `columns` of one output."""
    return sum(-(-width // columns) for width in widths)


@triton.jit
def dot_wide(a, b, acc, TF32: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b for float32 a and b of any dtype, with a as two summands of b's width instead of rounded to it.

    bfloat16 keeps 16 bits of a. float16 has not a's range, so its product is one of TF32, which holds b exactly and
    keeps 21 bits of a; without TF32 (ROCm) it is one of float32, as that of float32 b always is.
    """
    if b.dtype == tl.bfloat16:
        high = rounded(a, tl.bfloat16)
        acc = dot(rounded(a - high.to(tl.float32), tl.bfloat16), b, acc)
        acc = dot(high, b, acc)
    elif b.dtype == tl.float16 and TF32:
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        wide = b.to(tl.float32)
        acc = tl.dot(a - high, wide, acc, input_precision="tf32")
        acc = tl.dot(high, wide, acc, input_precision="tf32")
    else:
        acc = dot(a, b.to(tl.float32), acc)
    return acc


@triton.jit
def tile_at(tiles_ptr, index):  # type: ignore[no-untyped-def]
    """(first token, end token, slot) of a tile."""
    tile_ptr = tiles_ptr + index * 3
    return tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)


@triton.jit
def rank_row_offsets(page_ptr, rows, rank, width):  # type: ignore[no-untyped-def]
    """int64 element offsets of rank rows in the arena; anything for those past the rank, whose pages are not read."""
    page = tl.load(page_ptr + rows // _PAGE_ROWS, mask=rows < rank, other=0)
    return tl.multiple_of(page, 8) + (rows % _PAGE_ROWS) * width


@triton.jit
def row_scales(arena_ptr, page_ptr, rows, rank, SECOND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: the scales of rank rows of 8 bits, by the pages of the first factor: its own, or those of the second."""
    page = tl.load(page_ptr + rows // _PAGE_ROWS, mask=rows < rank, other=0)
    scale_ptrs = (arena_ptr + tl.multiple_of(page, 8)).to(tl.pointer_type(tl.float32))
    return tl.load(scale_ptrs + SECOND * _PAGE_ROWS + rows % _PAGE_ROWS, mask=rows < rank, other=0.0)


@triton.jit
def vector_ptr(arena_ptr, offset):  # type: ignore[no-untyped-def]
    """Where values lie that are no rank rows."""
    pointer = arena_ptr + tl.multiple_of(offset, 8)
    if arena_ptr.dtype.element_ty == tl.int8:
        pointer = pointer.to(tl.pointer_type(tl.bfloat16))
    return pointer


@triton.jit
def shrink(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    first,
    end,
    arena_ptr,
    page_ptr,
    rank,
    rank_begin,
    begin,
    stop,
    width,
    x_stop,
    residual_stop,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    TF32: tl.constexpr,
):
    """float32 [16, RANK_STEP]: columns begin .. stop of tokens first .. end times rank rows rank_begin ... .

    The input is x or, with HAS_RESIDUAL, the float32 sum of x and residual; the columns of each count up to its own
    stop (at most `stop`). Missing tokens and rank rows give 0. x meets weights of its own dtype and of 8 bits as it is,
    and others as float32; a sum is split as by `dot_wide`.
    """
    IS_INT8: tl.constexpr = arena_ptr.dtype.element_ty == tl.int8
    tokens = first + tl.arange(0, TOKENS)
    is_token = (tokens < end)[None, :, None]
    rows = rank_begin + tl.arange(0, RANK_STEP)
    is_row = (rows < rank)[None, :, None]
    lanes = (tl.arange(0, WARPS) * BLOCK_K)[:, None, None] + tl.arange(0, BLOCK_K)[None, None, :]
    x_ptrs = x_ptr + tokens.to(tl.int64)[None, :, None] * x_stride
    residual_ptrs = residual_ptr + tokens.to(tl.int64)[None, :, None] * residual_stride
    weight_ptrs = arena_ptr + rank_row_offsets(page_ptr, rows, rank, width)[None, :, None]
    if IS_INT8:
        weight_ptrs += _SCALES_ELEMENTS
    acc = tl.zeros((WARPS, TOKENS, RANK_STEP), tl.float32)
    for chunk in range(begin, stop, WARPS * BLOCK_K):
        column = chunk + lanes
        is_column = column < stop
        weight = tl.trans(tl.load(weight_ptrs + column, mask=is_row & is_column, other=0), (0, 2, 1))
        if IS_INT8:
            weight = from_int8(weight, tl.bfloat16 if HAS_RESIDUAL else x_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            x = tl.load(x_ptrs + column, mask=is_token & (column < x_stop), other=0.0).to(tl.float32)
            x += tl.load(residual_ptrs + column, mask=is_token & (column < residual_stop), other=0.0)
            acc = dot_wide(x, weight, acc, TF32)
        else:
            x = tl.load(x_ptrs + column, mask=is_token & (column < x_stop), other=0.0)
            if x.dtype != weight.dtype:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            acc = dot(x, weight, acc)
    inner = tl.sum(acc, 0)
    if IS_INT8:
        inner *= row_scales(arena_ptr, page_ptr, rows, rank, False)[None, :]
    return inner


@triton.jit
def inner_ptrs(inner_ptr, rank_begin, RANK_ROOM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a tile's rank rows rank_begin ... lie in its part [16, RANK_ROOM] of the workspace."""
    return inner_ptr + tl.arange(0, TOKENS)[:, None] * RANK_ROOM + rank_begin + tl.arange(0, RANK_STEP)[None, :]


@triton.jit
def expand(  # type: ignore[no-untyped-def]
    inner_ptr,
    splits,
    arena_ptr,
    page_ptr,
    rank,
    columns,
    width,
    RANK_ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TF32: tl.constexpr,
):
    """float32 [16, BLOCK_N]: t B at `columns`; t is the sum of `splits` parts [16, RANK_ROOM], in order."""
    acc = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for rank_begin in range(0, rank, RANK_STEP):
        rows = rank_begin + tl.arange(0, RANK_STEP)
        weight_ptrs = arena_ptr + rank_row_offsets(page_ptr, rows, rank, width)[:, None] + columns[None, :]
        weight = tl.load(weight_ptrs, mask=(rows < rank)[:, None] & (columns < width)[None, :], other=0)
        if weight.dtype == tl.int8:
            weight = from_int8(weight, tl.bfloat16)
        part = inner_ptrs(inner_ptr, rank_begin, RANK_ROOM)
        inner = tl.load(part)
        for split in range(1, splits):
            inner += tl.load(part + split * (TOKENS * RANK_ROOM))
        acc = dot_wide(inner, weight, acc, TF32)
    return acc
