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
"""Rows that a tile of `Nf4Layout.TILES` interleaves."""

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


class Nf4Layout(StrEnum):
    """The order of a weight's bytes; both are the same bytes in the same shapes.

    ROWS is bitsandbytes': row after row. TILES is for CPUs with vector registers, N a multiple of 16: the 4-byte words
    (8 columns) of 16 rows lie side by side, as [N / 16, K / 8, 16], and so do the scales, as [N / 16, K / 64, 16].
    """

    ROWS = "rows"
    TILES = "tiles"


@dataclass(frozen=True, eq=False, slots=True)
class Nf4Weight:
    """A linear layer's weight [N, K] in NF4; K is a multiple of 64.

    packed: uint8 [N, K / 2], the high nibble of byte j of a row is column 2j, the low one column 2j + 1.
    absmax: float32 [N, K / 64], the scale of each block. Both in the order that `layout` says.
    Raises ValueError for other shapes or dtypes.
    """

    packed: Tensor
    absmax: Tensor
    layout: Nf4Layout = Nf4Layout.ROWS

    def __post_init__(self) -> None:
        if self.packed.ndim != 2 or self.packed.dtype != torch.uint8:
            raise ValueError(f"packed: must be uint8 [N, K/2], got {self.packed.dtype} {list(self.packed.shape)}")
        rows, columns = self.shape
        if columns % NF4_BLOCK:
            raise ValueError(f"packed: K must be a multiple of {NF4_BLOCK}, got {columns}")
        wanted = (rows, columns // NF4_BLOCK)
        if tuple(self.absmax.shape) != wanted or self.absmax.dtype != torch.float32:
            raise ValueError(
                f"absmax: must be float32 {list(wanted)}, got {self.absmax.dtype} {list(self.absmax.shape)}"
            )
        if self.layout is Nf4Layout.TILES and rows % TILE_ROWS:
            raise ValueError(f"layout: tiles need N to be a multiple of {TILE_ROWS}, got {rows}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    @classmethod
    def cat(cls, weights: Sequence["Nf4Weight"]) -> "Nf4Weight":
        """Stack weights of the same K along N. Lossless. Raises ValueError for none, or when K or layout differ."""
        if len({(weight.shape[1], weight.layout) for weight in weights}) != 1:
            shapes = [(*weight.shape, str(weight.layout)) for weight in weights]
            raise ValueError(f"weights: must all have the same K and layout, got {shapes}")
        layout = weights[0].layout
        return cls(torch.cat([w.packed for w in weights]), torch.cat([w.absmax for w in weights]), layout)

    def rows(self, start: int, end: int) -> "Nf4Weight":
        """Rows `start` .. `end` (end excluded), as a view. In tiles both must be multiples of 16."""
        if self.layout is Nf4Layout.TILES and start % TILE_ROWS:
            raise ValueError(f"rows: a view of tiles starts at a multiple of {TILE_ROWS}, got {start}")
        return Nf4Weight(self.packed[start:end], self.absmax[start:end], self.layout)

    def tiled(self) -> "Nf4Weight":
        """The same weight in `Nf4Layout.TILES`, a copy unless it is already. Raises ValueError unless 16 divides N."""
        if self.layout is Nf4Layout.TILES:
            return self
        rows = self.shape[0]
        if rows % TILE_ROWS:
            raise ValueError(f"layout: tiles need N to be a multiple of {TILE_ROWS}, got {rows}")

        def tile(x: Tensor) -> Tensor:
            return x.view(rows // TILE_ROWS, TILE_ROWS, -1).transpose(1, 2).contiguous()

        packed = tile(self.packed.contiguous().view(torch.int32)).view(rows, -1).view(torch.uint8)
        return Nf4Weight(packed, tile(self.absmax.contiguous()).view(rows, -1), Nf4Layout.TILES)

    def row_major(self) -> "Nf4Weight":
        """The same weight in `Nf4Layout.ROWS`, a copy unless it is already."""
        if self.layout is Nf4Layout.ROWS:
            return self
        rows = self.shape[0]

        def untile(x: Tensor) -> Tensor:
            return x.view(rows // TILE_ROWS, -1, TILE_ROWS).transpose(1, 2).contiguous().view(rows, -1)

        packed = untile(self.packed.contiguous().view(torch.int32)).view(torch.uint8)
        return Nf4Weight(packed, untile(self.absmax.contiguous()))

    def padded(self) -> "Nf4Weight":
        """This weight with zero rows up to a multiple of 16, a copy unless there is nothing to add."""
        missing = -self.shape[0] % TILE_ROWS
        if not missing:
            return self
        grow = (0, 0, 0, missing)
        return Nf4Weight(functional.pad(self.packed, grow), functional.pad(self.absmax, grow))


@cache
def _pair_table(device: torch.device) -> Tensor:
    """int64 [256]: the two float32 levels of each packed byte as one 8-byte element, for one look-up a byte."""
    byte = torch.arange(256, device=device)
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).view(torch.int64).flatten()


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W[n, k] = code[nibble(n, k)] * absmax[n, k // 64], computed in float32 and rounded once to `dtype`: [N, K]."""
    weight = weight.row_major()
    rows, columns = weight.shape
    pairs = _pair_table(weight.packed.device).index_select(0, weight.packed.flatten().int())
    blocks = pairs.view(torch.float32).view(rows, columns // NF4_BLOCK, NF4_BLOCK)
    return blocks.mul_(weight.absmax.unsqueeze(-1)).view(rows, columns).to(dtype)
