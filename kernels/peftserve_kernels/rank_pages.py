"""Low-rank factors in a paged arena: both factors of an adapter are stored as rank rows, in pages of eight.

A factor of rank r and width w (LoRA A and transposed B, bottleneck down and transposed up) takes ceil(r / 8) pages of
[8, w], row-major. A page is known by the element offset of its first value in the arena; the pages of one factor need
not be adjacent. Rows past the real rank are zero.

An arena of int8 keeps rows rounded to 8 bits, symmetrically and each by itself: q = round(w / s), s = max |w| / 127.
Its elements are bytes. A page of the first factor (A, down) begins with `SCALES_ELEMENTS` of them, float32 [2, 8]: the
scales of its own rows and those of the same rows of the second factor, so that whoever multiplies by the first has both
at hand for what is in between. What the arena holds besides pages (biases, row scales) is bfloat16 then, two elements a
value.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

RANK_PAGE_ROWS: Final = 8
SCALES_ELEMENTS: Final = 2 * RANK_PAGE_ROWS * torch.float32.itemsize
_LARGEST: Final = 127


def rank_pages(rank: int) -> int:
    """How many pages a factor of `rank` rows takes."""
    return -(-rank // RANK_PAGE_ROWS)


def page_header(dtype: torch.dtype) -> int:
    """How many elements of an arena of `dtype` lie in a page of a first factor before its rows."""
    return SCALES_ELEMENTS if dtype == torch.int8 else 0


def vector_dtype(arena_dtype: torch.dtype) -> torch.dtype:
    """The type of what an arena holds besides pages."""
    return torch.bfloat16 if arena_dtype == torch.int8 else arena_dtype


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [r, w], float32, as int8 [r, w] and their scales, float32 [r]. A row of zeros has the scale 0."""
    scales = rows.abs().amax(dim=1) / _LARGEST
    steps = torch.where(scales > 0, scales, 1.0)[:, None]
    return (rows / steps).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def read_factors(
    arena: Tensor, first_pages: Sequence[int], second_pages: Sequence[int], rank: int, widths: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Both factors of an adapter, float32 [rank, widths[0]] and [rank, widths[1]]."""
    header = page_header(arena.dtype)
    first = read_rank_rows(arena, [page + header for page in first_pages], rank, widths[0]).float()
    second = read_rank_rows(arena, second_pages, rank, widths[1]).float()
    if header:
        stored = [arena[page : page + header] for page in first_pages[: rank_pages(rank)]]
        scales = torch.stack(stored).view(torch.float32).view(-1, 2, RANK_PAGE_ROWS).transpose(0, 1).reshape(2, -1, 1)
        first, second = first * scales[0, :rank], second * scales[1, :rank]
    return first, second


def read_rank_rows(arena: Tensor, pages: Sequence[int], rank: int, width: int) -> Tensor:
    """The `rank` rows of a factor, [rank, width] in the arena's dtype: a view for one page, a copy for more."""
    count = rank_pages(rank)
    parts = [arena[offset : offset + RANK_PAGE_ROWS * width] for offset in pages[:count]]
    rows = parts[0] if count == 1 else torch.cat(parts)
    return rows.view(-1, width)[:rank]


def read_vector(arena: Tensor, offset: int, size: int) -> Tensor:
    """`size` values that are no page, float32."""
    dtype = vector_dtype(arena.dtype)
    return arena[offset : offset + size * dtype.itemsize // arena.dtype.itemsize].view(dtype).float()
