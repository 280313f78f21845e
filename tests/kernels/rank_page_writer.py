"""Fills rank pages as a loader does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peftserve_kernels import RANK_PAGE_ROWS
from peftserve_kernels.rank_pages import page_header, vector_dtype


def write_rank_rows(arena: Tensor, pages: Sequence[int], rows: Tensor) -> None:
    """Store `rows` [rank, width] into `pages` of the arena, zeros past the rank."""
    rank, width = rows.shape
    for index, offset in enumerate(pages):
        part = rows[index * RANK_PAGE_ROWS : min(rank, (index + 1) * RANK_PAGE_ROWS)]
        page = arena[offset : offset + RANK_PAGE_ROWS * width].view(RANK_PAGE_ROWS, width)
        page.zero_()
        page[: len(part)] = part


def fill_with_nan(arena: Tensor) -> None:
    """NaN everywhere, as scales and vectors of an arena of int8 too."""
    arena.fill_(-1 if arena.dtype == torch.int8 else torch.nan)


def room(width: int, dtype: torch.dtype) -> int:
    """Elements that are enough for a page, or for two vectors of `width` values."""
    return page_header(dtype) + RANK_PAGE_ROWS * width


def put_page(arena: Tensor, offset: int, rows: int, width: int, *, is_first: bool, size: float = 1.0) -> None:
    """Random values of about `size` as the first `rows` rows of a page."""
    if arena.dtype != torch.int8:
        arena[offset : offset + rows * width] = (torch.randn(rows * width) * size).to(arena.dtype)
        return
    header = page_header(arena.dtype) if is_first else 0
    if is_first:
        scales = arena[offset : offset + header].view(torch.float32).view(2, RANK_PAGE_ROWS)
        scales[:, :rows] = (torch.rand(2, rows) + 0.5) * size / 64
    arena[offset + header : offset + header + rows * width] = torch.randint(-127, 128, (rows * width,))


def put_vector(arena: Tensor, offset: int, values: Tensor) -> None:
    """Store `values` as something that is no page."""
    dtype = vector_dtype(arena.dtype)
    arena[offset : offset + len(values) * dtype.itemsize // arena.dtype.itemsize].view(dtype).copy_(values)
