"""Low-rank factors in a paged arena: both factors of an adapter are stored as rank rows, in pages of eight.

A factor of rank r and width w (LoRA A and transposed B, bottleneck down and transposed up) takes ceil(r / 8) pages of
[8, w], row-major. A page is known by the element offset of its first value in the arena; the pages of one factor need
not be adjacent. Rows past the real rank are zero.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

RANK_PAGE_ROWS: Final = 8


def rank_pages(rank: int) -> int:
    """How many pages a factor of `rank` rows takes."""
    return -(-rank // RANK_PAGE_ROWS)


def read_rank_rows(arena: Tensor, pages: Sequence[int], rank: int, width: int) -> Tensor:
    """The `rank` rows of a factor, [rank, width] in the arena's dtype: a view for one page, a copy for more."""
    count = rank_pages(rank)
    parts = [arena[offset : offset + RANK_PAGE_ROWS * width] for offset in pages[:count]]
    rows = parts[0] if count == 1 else torch.cat(parts)
    return rows.view(-1, width)[:rank]
