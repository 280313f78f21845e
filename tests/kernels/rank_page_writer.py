"""Fills rank pages as a loader does."""

from collections.abc import Sequence

from torch import Tensor

from peftserve_kernels import RANK_PAGE_ROWS


def write_rank_rows(arena: Tensor, pages: Sequence[int], rows: Tensor) -> None:
    """Store `rows` [rank, width] into `pages` of the arena, zeros past the rank."""
    rank, width = rows.shape
    for index, offset in enumerate(pages):
        part = rows[index * RANK_PAGE_ROWS : min(rank, (index + 1) * RANK_PAGE_ROWS)]
        page = arena[offset : offset + RANK_PAGE_ROWS * width].view(RANK_PAGE_ROWS, width)
        page.zero_()
        page[: len(part)] = part
