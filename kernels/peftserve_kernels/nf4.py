"""NF4: bitsandbytes' 4-bit format, as the kernels read it.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314): sixteen levels at the quantiles of a normal distribution, scaled by the
largest magnitude (absmax) of each block of 64 consecutive weights of a row. On disk bitsandbytes quantises the absmax
again, with statistics of the whole tensor; here it is flattened to float32 once at load, so that weights of several
tensors (q, k, v) can be stacked row-wise although each had statistics of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

NF4_BLOCK: Final = 64

TILE_ROWS: Final = 16
"""Rows that a tile of `Nf4Layout.TILES` or `Nf4Layout.BLOCKS` holds."""

# bitsandbytes' table (csrc/kernels.cu, functional.get_4bit_type), each the shortest decimal of its float32
NF4_CODE: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


BLOCKED_CODES: Final = (0, 2, 4, 10, 13, 15, 6, 12, 1, 3, 5, 9, 11, 14, 7, 8)
"""The code that a nibble of `Nf4Layout.BLOCKS` stands for; `gpu/nf4_decode.py` says why in this order."""


class Nf4Layout(StrEnum):
    """The order of a weight's bytes; each holds the same weight in the same shapes, losslessly.

    ROWS is bitsandbytes': row after row. The others take N in tiles of 16 rows, and N must be a multiple of 16.
    TILES is for CPUs with vector registers: the 4-byte words (8 columns) of 16 rows lie side by side, as
    [N / 16, K / 8, 16], and so do the scales, as [N / 16, K / 64, 16].
    BLOCKS is for tensor cores: the blocks of 16 rows lie side by side, as [N / 16, K / 64, 16, 32 bytes], and so do
    the scales, as [N / 16, K / 64, 16]. Byte 4i + t of a block holds column 16t + 2i in its low nibble and column
    16t + 2i + 1 in its high one, so that a 4-byte word read as the operand of a 16x16x16 product becomes, decoded,
    the same thread's operand of four such products. Its nibbles are renumbered by `BLOCKED_CODES`.
    """

    ROWS = "rows"
    TILES = "tiles"
    BLOCKS = "blocks"


@dataclass(frozen=True, eq=False, slots=True)
class Nf4Weight:
    """A linear layer's weight [N, K] in NF4; K is a multiple of 64.

    packed: uint8 [N, K / 2], the high nibble of byte j of a row is column 2j, the low one column 2j + 1.
    absmax: float32 [N, K / 64], the scale of each block. Both in the order that `layout` says, and both with `padding`
    more rows, zeros that fill the last tile and are no part of the weight.
    Raises ValueError for other shapes or dtypes.
    """

    packed: Tensor
    absmax: Tensor
    layout: Nf4Layout = Nf4Layout.ROWS
    padding: int = 0

    def __post_init__(self) -> None:
        if self.packed.ndim != 2 or self.packed.dtype != torch.uint8:
            raise ValueError(f"packed: must be uint8 [N, K/2], got {self.packed.dtype} {list(self.packed.shape)}")
        rows, columns = self.packed.shape[0], self.packed.shape[1] * 2
        if columns % NF4_BLOCK:
            raise ValueError(f"packed: K must be a multiple of {NF4_BLOCK}, got {columns}")
        wanted = (rows, columns // NF4_BLOCK)
        if tuple(self.absmax.shape) != wanted or self.absmax.dtype != torch.float32:
            raise ValueError(
                f"absmax: must be float32 {list(wanted)}, got {self.absmax.dtype} {list(self.absmax.shape)}"
            )
        if self.layout is not Nf4Layout.ROWS:
            _check_tiles(rows)
        if not 0 <= self.padding < TILE_ROWS or self.padding > rows:
            raise ValueError(f"padding: must be fewer rows than a tile's {TILE_ROWS}, got {self.padding} of {rows}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        return self.packed.shape[0] - self.padding, self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    @classmethod
    def cat(cls, weights: Sequence["Nf4Weight"]) -> "Nf4Weight":
        """Stack weights of the same K along N. Lossless.

        Raises ValueError for none, when K or layout differ, or for one with padding.
        """
        if any(weight.padding for weight in weights):
            raise ValueError("weights: stack them before they are padded")
        if len({(weight.shape[1], weight.layout) for weight in weights}) != 1:
            shapes = [(*weight.shape, str(weight.layout)) for weight in weights]
            raise ValueError(f"weights: must all have the same K and layout, got {shapes}")
        layout = weights[0].layout
        return cls(torch.cat([w.packed for w in weights]), torch.cat([w.absmax for w in weights]), layout)

    def rows(self, start: int, end: int) -> "Nf4Weight":
        """Rows `start` .. `end` (end excluded), as a view. Except in `ROWS` both must be multiples of 16.

        Raises ValueError for other rows, or for a weight with padding.
        """
        if self.padding:
            raise ValueError("rows: a padded weight has no views")
        if self.layout is not Nf4Layout.ROWS and start % TILE_ROWS:
            raise ValueError(f"rows: a view of tiles starts at a multiple of {TILE_ROWS}, got {start}")
        return Nf4Weight(self.packed[start:end], self.absmax[start:end], self.layout)

    def tiled(self) -> "Nf4Weight":
        """The same weight in `Nf4Layout.TILES`, a copy unless it is already. Raises ValueError unless 16 divides N."""
        if self.layout is Nf4Layout.TILES:
            return self
        weight = self if self.layout is Nf4Layout.ROWS else self.row_major().padded()
        rows = weight.packed.shape[0]
        _check_tiles(rows)
        packed = _tile(weight.packed.contiguous().view(torch.int32)).view(rows, -1).view(torch.uint8)
        return Nf4Weight(packed, _tile(weight.absmax).view(rows, -1), Nf4Layout.TILES, weight.padding)

    def blocked(self) -> "Nf4Weight":
        """The same weight in `Nf4Layout.BLOCKS`, a copy unless it is already. Raises ValueError unless 16 divides N."""
        if self.layout is Nf4Layout.BLOCKS:
            return self
        weight = self if self.layout is Nf4Layout.ROWS else self.row_major().padded()
        rows, columns = weight.packed.shape[0], weight.shape[1]
        _check_tiles(rows)
        nibbles = _renumber(weight.packed, to_blocks=True)
        words = nibbles.view(rows // TILE_ROWS, TILE_ROWS, columns // NF4_BLOCK, 4, 8).permute(0, 2, 1, 4, 3)
        return Nf4Weight(words.reshape(rows, -1), _tile(weight.absmax).view(rows, -1), Nf4Layout.BLOCKS, weight.padding)

    def row_major(self) -> "Nf4Weight":
        """The same weight in `Nf4Layout.ROWS` without padding, a copy unless it is already."""
        wanted = self.shape[0]
        if self.layout is Nf4Layout.ROWS:
            return self if not self.padding else Nf4Weight(self.packed[:wanted], self.absmax[:wanted])
        rows, columns = self.packed.shape[0], self.shape[1]
        absmax = _untile(self.absmax)[:wanted]
        if self.layout is Nf4Layout.TILES:
            packed = _untile(self.packed.contiguous().view(torch.int32)).view(torch.uint8)
            return Nf4Weight(packed[:wanted], absmax)
        words = self.packed.reshape(rows // TILE_ROWS, columns // NF4_BLOCK, TILE_ROWS, 8, 4).permute(0, 2, 1, 4, 3)
        return Nf4Weight(_renumber(words.reshape(rows, -1), to_blocks=False)[:wanted], absmax)

    def padded(self) -> "Nf4Weight":
        """This weight, in `ROWS`, with `padding` up to a multiple of 16, a copy unless there is nothing to add."""
        missing = -self.packed.shape[0] % TILE_ROWS
        if not missing:
            return self
        grow = (0, 0, 0, missing)
        return Nf4Weight(functional.pad(self.packed, grow), functional.pad(self.absmax, grow), padding=missing)


def _check_tiles(rows: int) -> None:
    if rows % TILE_ROWS:
        raise ValueError(f"layout: tiles need N to be a multiple of {TILE_ROWS}, got {rows}")


def _tile(x: Tensor) -> Tensor:
    """[N, C] as [N / 16, C, 16]."""
    return x.reshape(x.shape[0] // TILE_ROWS, TILE_ROWS, -1).transpose(1, 2).contiguous()


def _untile(x: Tensor) -> Tensor:
    """The inverse of `_tile`, from and to [N, C]."""
    return x.reshape(x.shape[0] // TILE_ROWS, -1, TILE_ROWS).transpose(1, 2).contiguous().view(x.shape[0], -1)


def _renumber(packed: Tensor, *, to_blocks: bool) -> Tensor:
    """Each byte with its nibbles exchanged and renumbered: from the codes of `ROWS` to those of `BLOCKS`, or back."""
    byte = torch.arange(256, device=packed.device)
    codes = torch.tensor(BLOCKED_CODES, device=packed.device)
    number = codes.argsort() if to_blocks else codes
    table = (number[byte & 15] << 4 | number[byte >> 4]).to(torch.uint8)
    return table.index_select(0, packed.flatten().int()).view(packed.shape)


INT8_LEVEL_SCALE: Final = 112
"""With int8 inputs a level counts as round(112 level) / 112: of all scales up to 127 that one hits the sixteen best."""


@cache
def _pair_table(device: torch.device, int8_levels: bool) -> Tensor:
    """int64 [256]: the two float32 levels of each packed byte as one 8-byte element, for one look-up a byte."""
    byte = torch.arange(256, device=device)
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    if int8_levels:
        code = (code * INT8_LEVEL_SCALE).round() / INT8_LEVEL_SCALE
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).view(torch.int64).flatten()


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype = torch.float32, *, int8_levels: bool = False) -> Tensor:
    """W[n, k] = code[nibble(n, k)] * absmax[n, k // 64], computed in float32 and rounded once to `dtype`: [N, K].

    With `int8_levels` the code is what products with int8 inputs take for it.
    """
    weight = weight.row_major()
    rows, columns = weight.shape
    pairs = _pair_table(weight.packed.device, int8_levels).index_select(0, weight.packed.flatten().int())
    blocks = pairs.view(torch.float32).view(rows, columns // NF4_BLOCK, NF4_BLOCK)
    return blocks.mul_(weight.absmax.unsqueeze(-1)).view(rows, columns).to(dtype)
