"""nf4_linear in Triton: decode in registers, multiply on tensor cores, scale the sums of each block.

A program takes BLOCK_N rows of W and BLOCK_M tokens and walks K in blocks of 64, the granularity of absmax:
acc += absmax[n, b] * (levels[n, b] . x[m, b]), with unscaled levels on the tensor cores and float32 around them, so
that no scaled weight is ever rounded. K is cut into splits, a number that depends on K, N and the target but not on M:
few tokens run them as programs whose sums a second kernel adds, many run them one after the other, and both add in the
same order. So a row of y does not depend on its neighbours, and on M only where the hardware adds the 64 products of a
block in another order: mma, wgmma and tcgen05 need not agree on that, nor mma with W left and W right.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.device import dot
from peftserve_kernels.gpu.launch import INTERPRETED, Target, current_target, launch
from peftserve_kernels.gpu.nf4_decode import LEVEL_SCALE, decode_words, decode_words_portably, portable_table
from peftserve_kernels.nf4 import NF4_BLOCK, Nf4Layout, Nf4Weight


class Config(NamedTuple):
    """The launch for up to `most_tokens`: BLOCK_M tokens by BLOCK_N rows of W, which is the left operand or the right.

    splits_in_turn: a program runs all splits of K one after the other. most_unroll: blocks of a turn of the loop.
    """

    most_tokens: int
    block_m: int
    block_n: int
    weight_first: bool
    num_warps: int
    num_stages: int
    splits_in_turn: bool = False
    most_unroll: int = 4


_UNLIMITED: Final = 1 << 62

# An mma has 16 rows of its left operand and 8 of its right one: W is left for 8 tokens, and where it is decoded right
# into the registers that the product reads, which from 64 rows and 4 warps on is wgmma on Hopper (its left operand may
# be in registers) and tcgen05 on Blackwell. For 16 tokens both stay at mma by W on the right, for 8 by fewer rows:
# the compiler interleaves mma with decoding, while every wgmma of one block is waited for.
_AMPERE: Final = (
    Config(8, 8, 64, True, 4, 3),
    Config(16, 16, 64, True, 4, 3),
    Config(32, 32, 64, False, 4, 3),  # W left spills where K is one range
    Config(64, 64, 128, True, 8, 3),
    Config(_UNLIMITED, 64, 128, True, 8, 3, splits_in_turn=True, most_unroll=2),
)
_HOPPER: Final = (
    Config(8, 8, 32, True, 2, 3),
    Config(16, 16, 64, False, 4, 3),
    Config(32, 32, 64, True, 4, 3),
    Config(64, 64, 128, True, 8, 3),
    Config(_UNLIMITED, 64, 128, True, 8, 3, splits_in_turn=True),
)
_BLACKWELL: Final = (
    Config(8, 8, 32, True, 2, 3),
    Config(16, 16, 64, False, 4, 3),
    Config(32, 32, 64, False, 4, 3),
    Config(64, 64, 128, True, 4, 3),
    Config(_UNLIMITED, 64, 128, True, 4, 3, splits_in_turn=True, most_unroll=1),
)
_CDNA: Final = (
    Config(16, 16, 64, True, 4, 2),
    Config(64, 64, 64, True, 4, 2),
    Config(_UNLIMITED, 64, 64, True, 4, 2, splits_in_turn=True),
)
# No tensor cores: correct, not fast.
_FLOAT32: Final = (
    Config(16, 16, 32, True, 4, 1, most_unroll=1),
    Config(_UNLIMITED, 32, 32, True, 4, 1, splits_in_turn=True, most_unroll=1),
)

# Programs of 64 rows of W that give each multiprocessor about two: by the oldest target that has so many.
_PROGRAMS_WANTED: Final = ((100, 296), (90, 264), (0, 216))
_PROGRAMS_WANTED_HIP: Final = 608
_FEWEST_BLOCKS: Final = 4
_MOST_SPLITS: Final = 8

# Elements that a program of the second kernel adds.
_REDUCE_BLOCK: Final = 512


def launch_config(target: Target, dtype: torch.dtype, tokens: int) -> Config:
    """The launch for so many tokens, at least 1."""
    table: tuple[Config, ...]
    if dtype == torch.float32:
        table = _FLOAT32
    elif not isinstance(target.arch, int):
        table = _CDNA
    elif target.arch // 10 == 10:
        table = _BLACKWELL
    else:
        table = _HOPPER if target.arch // 10 == 9 else _AMPERE
    return next(config for config in table if tokens <= config.most_tokens)


class Splits(NamedTuple):
    """K in `number` ranges of `blocks` blocks, the last perhaps shorter; `unroll` divides all of them."""

    number: int
    blocks: int
    unroll: int


def splits_of(target: Target, rows: int, columns: int) -> Splits:
    """How K is cut: into as many ranges, a power of two, as fill the chip. Neither tokens nor dtype matter."""
    if isinstance(target.arch, int):
        wanted = next(programs for arch, programs in _PROGRAMS_WANTED if target.arch >= arch)
    else:
        wanted = _PROGRAMS_WANTED_HIP
    blocks = columns // NF4_BLOCK
    unroll = next(unroll for unroll in (4, 3, 2, 1) if blocks % unroll == 0)
    number = 1
    while number < _MOST_SPLITS and number * -(-rows // 64) < wanted * 3 // 4 and blocks >= 2 * number * _FEWEST_BLOCKS:
        number *= 2
    turns = -(-blocks // (unroll * number))
    return Splits(-(-blocks // (unroll * turns)), unroll * turns, unroll)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, *, int8_inputs: bool = False) -> Tensor:
    """See `peftserve_kernels.nf4_linear`, but without `int8_inputs`. `Nf4Layout.BLOCKS` is read as it is, any other
    layout is converted first, at each call and in no captured step: `prepare_nf4` does it once.

    bf16 and fp16: products of x and the levels rounded to x's dtype, float32 sums and scales. float32: float32.
    """
    rows, columns = weight.shape
    tokens = x.shape[0]
    y = x.new_empty(tokens, rows)
    if not tokens or not rows:
        return y
    if weight.layout is not Nf4Layout.BLOCKS:
        weight = weight.row_major().padded().blocked()
    if x.stride(1) != 1:
        x = x.contiguous()
    target = current_target(x.device)
    config = launch_config(target, x.dtype, tokens)
    splits = splits_of(target, rows, columns)
    is_partial = splits.number > 1 and not config.splits_in_turn
    sums = x.new_empty(splits.number, tokens, rows, dtype=torch.float32) if is_partial else y
    uses_ptx = x.dtype != torch.float32 and target.backend == "cuda" and not INTERPRETED
    inverse_scale = 1.0 / LEVEL_SCALE[x.dtype]
    # Rows that share x are neighbours, and among many tokens those that share W.
    grid = (-(-tokens // config.block_m), -(-rows // config.block_n), splits.number if is_partial else 1)
    launch(
        _multiply,
        grid,
        x,
        weight.packed.view(torch.int16 if uses_ptx else torch.int32),
        weight.absmax,
        None if is_partial else bias,
        sums,
        tokens,
        rows,
        weight.packed.shape[0],
        columns // NF4_BLOCK,
        x.stride(0),
        splits.blocks,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        UNROLL=max(n for n in range(1, config.most_unroll + 1) if splits.unroll % n == 0),
        TURNS=1 if is_partial else splits.number,
        IS_PARTIAL=is_partial,
        WEIGHT_FIRST=config.weight_first,
        USES_PTX=uses_ptx,
        TABLE=None if uses_ptx else portable_table(x.dtype),
        INVERSE_SCALE=inverse_scale,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if is_partial:
        elements = tokens * rows
        launch(
            _add_splits,
            (-(-elements // _REDUCE_BLOCK),),
            sums,
            bias,
            y,
            elements,
            rows,
            SPLITS=splits.number,
            INVERSE_SCALE=inverse_scale,
            BLOCK=_REDUCE_BLOCK,
            num_warps=4,
        )
    return y


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x,
    packed,
    absmax,
    bias,
    y,
    tokens,
    rows,
    padded_rows,
    blocks,
    x_stride,
    split_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    TURNS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    USES_PTX: tl.constexpr,
    TABLE: tl.constexpr,
    INVERSE_SCALE: tl.constexpr,
):
    """y = x W^T + bias, or float32 y [splits, tokens, rows] without bias. TURNS: the splits of one program."""
    split = tl.program_id(2)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end the last row is read again, so that loads need no mask; it is not stored.
    x += tl.minimum(m, tokens - 1) * x_stride
    tile_row = tl.minimum(n, padded_rows - 1)
    tile = (tile_row // 16).to(tl.int64) * blocks
    tile_row = tile_row % 16
    sums = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_N), tl.float32)
    for turn in range(TURNS):
        part = _split_sums(
            x, packed, absmax, tile, tile_row, blocks, (split + turn) * split_blocks, split_blocks,
            BLOCK_M, BLOCK_N, UNROLL, WEIGHT_FIRST, USES_PTX, TABLE,
        )  # fmt: skip
        sums += part
    is_inside = (m < tokens)[:, None] & (n < rows)[None, :]
    offsets = m[:, None] * rows + n[None, :]
    if WEIGHT_FIRST:
        sums = tl.trans(sums)
    if IS_PARTIAL:
        y += split.to(tl.int64) * tokens * rows
    else:
        sums *= INVERSE_SCALE
        if bias is not None:
            sums += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets, sums.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def _split_sums(  # type: ignore[no-untyped-def]
    x,
    packed,
    absmax,
    tile,
    tile_row,
    blocks,
    first,
    split_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    USES_PTX: tl.constexpr,
    TABLE: tl.constexpr,
):
    """The sums of blocks first .. first + split_blocks, as far as there are: [rows, tokens] if WEIGHT_FIRST."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    WORDS: tl.constexpr = 16 if USES_PTX else 8
    last = tl.minimum(first + split_blocks, blocks)
    x_block = x[:, None] + first * 64 + tl.arange(0, 64)[None, :]
    packed_block = packed + ((tile + first) * (16 * WORDS) + tile_row * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    absmax += tile * 16 + tile_row
    sums = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_N), tl.float32)
    # Operands of products go through the compiler's pipeline, scales do not: they are loaded a turn ahead.
    scales = _scales(absmax + first * 16, UNROLL)
    for block in range(first, last, UNROLL):
        next_scales = _scales(absmax + tl.minimum(block + UNROLL, last - UNROLL) * 16, UNROLL)
        for i in tl.static_range(UNROLL):
            words = tl.load(packed_block + i * (16 * WORDS))
            inputs = tl.load(x_block + i * 64)
            weights = decode_words(words, DTYPE) if USES_PTX else decode_words_portably(words, DTYPE, TABLE)
            if WEIGHT_FIRST:
                sums += dot(weights, tl.trans(inputs), tl.zeros_like(sums)) * scales[i][:, None]
            else:
                sums += dot(inputs, tl.trans(weights), tl.zeros_like(sums)) * scales[i][None, :]
        scales = next_scales
        packed_block += UNROLL * 16 * WORDS
        x_block += UNROLL * 64
    return sums


@triton.jit
def _scales(absmax, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]
    """absmax of UNROLL blocks, repeated to four."""
    return (
        tl.load(absmax),
        tl.load(absmax + 16 * (1 % UNROLL)),
        tl.load(absmax + 16 * (2 % UNROLL)),
        tl.load(absmax + 16 * (3 % UNROLL)),
    )


@triton.jit
def _add_splits(  # type: ignore[no-untyped-def]
    sums, bias, y, elements, rows, SPLITS: tl.constexpr, INVERSE_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """y = (sums[0] + sums[1] + ...) * INVERSE_SCALE + bias, in that order, the order of `_multiply`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < elements
    total = tl.load(sums + offsets, mask=is_inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + split * elements.to(tl.int64) + offsets, mask=is_inside, other=0.0)
    total *= INVERSE_SCALE
    if bias is not None:
        total += tl.load(bias + offsets % rows, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=is_inside)
