import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftserve_kernels import RANK_PAGE_ROWS, rank_pages, read_rank_rows
from peftserve_kernels.rank_pages import SCALES_ELEMENTS, quantize_rows, read_factors
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


@given(rank=st.integers(1, 20), width=st.integers(1, 70), power=st.integers(-120, 120), seed=st.integers(0, 2**16))
def test_rows_in_eight_bits(rank: int, width: int, power: int, seed: int) -> None:
    """Off by half a step at most, whatever their size; rounding again changes nothing."""
    rows = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values, scales = quantize_rows(rows)
    assert values.dtype == torch.int8
    assert int(values.abs().amax(dim=1).min()) == 127
    kept = values * scales[:, None]
    assert bool(((kept - rows).abs() <= 0.501 * scales[:, None]).all())
    assert torch.equal(quantize_rows(kept)[0], values)


def test_rows_of_nothing_in_eight_bits() -> None:
    smallest = torch.finfo(torch.float32).smallest_normal
    values, scales = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -1.0], [smallest / 64, 0.0]]))
    assert values[0].tolist() == [0, 0]
    assert values[1].tolist() == [127, -127]
    assert scales[0] == 0.0
    assert (values * scales[:, None]).isfinite().all()


def test_both_factors_in_eight_bits() -> None:
    """Scales of both lie before the rows of the first."""
    arena = torch.zeros(4096, dtype=torch.int8)
    first, second = torch.randn(11, 6), torch.randn(11, 9)
    pages = [64, 1024], [2048, 3000]
    (quantized, scales), (other, other_scales) = quantize_rows(first), quantize_rows(second)
    write_rank_rows(arena, [page + SCALES_ELEMENTS for page in pages[0]], quantized)
    write_rank_rows(arena, pages[1], other)
    for index, page in enumerate(pages[0]):
        header = arena[page : page + SCALES_ELEMENTS].view(torch.float32).view(2, RANK_PAGE_ROWS)
        part = slice(index * RANK_PAGE_ROWS, min(11, (index + 1) * RANK_PAGE_ROWS))
        for half, values in enumerate((scales[part], other_scales[part])):
            header[half, : len(values)] = values

    a, b = read_factors(arena, *pages, 11, (6, 9))

    assert torch.equal(a, quantized * scales[:, None])
    assert torch.equal(b, other * other_scales[:, None])
