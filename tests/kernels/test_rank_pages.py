import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftserve_kernels import RANK_PAGE_ROWS, rank_pages, read_rank_rows
from tests.kernels.rank_page_writer import write_rank_rows


@given(rank=st.integers(1, 40), width=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_round_trip_through_scattered_pages(rank: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = rank_pages(rank) + 3
    arena = torch.full((total * RANK_PAGE_ROWS * width,), 7.0)
    pages = (torch.randperm(total, generator=generator)[: rank_pages(rank)] * RANK_PAGE_ROWS * width).tolist()
    rows = torch.randn(rank, width, generator=generator)

    write_rank_rows(arena, pages, rows)

    assert torch.equal(read_rank_rows(arena, pages, rank, width), rows)
    padded = read_rank_rows(arena, pages, rank_pages(rank) * RANK_PAGE_ROWS, width)
    assert not padded[rank:].any()
    assert int((arena == 7.0).sum()) == 3 * RANK_PAGE_ROWS * width


@pytest.mark.parametrize(("rank", "pages"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_rank_pages(rank: int, pages: int) -> None:
    assert rank_pages(rank) == pages
