from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peftserve_kernels import RANK_PAGE_ROWS, Activation, BottleneckInput, BottleneckWeights, Segments, rank_pages
from peftserve_kernels.bottleneck import bottleneck_add_reference
from peftserve_kernels.cpu.bottleneck import bottleneck_add
from tests.kernels.native import ISAS, isa, same_bits, threads
from tests.kernels.rank_page_writer import fill_with_nan, put_page, put_vector, room

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARENAS = [*DTYPES, torch.int8]
LAYERS = 2


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


def make_weights(
    widths: Sequence[tuple[int, int]], columns: int, dtype: torch.dtype = torch.float32
) -> BottleneckWeights:
    """widths[slot][site]; slots go through the activations and inputs in turn; rows past the width are NaN."""
    pages = rank_pages(max(max(row) for row in widths)) or 1
    page = room(columns, dtype)
    total = LAYERS * sum(2 * rank_pages(width) + 2 for row in widths for width in row) + 1
    weights = BottleneckWeights.empty(elements=total * page, slots=len(widths), layers=LAYERS, pages=pages, dtype=dtype)
    fill_with_nan(weights.arena)
    free = (torch.randperm(total) * page).tolist()

    def bias(values: int) -> int:
        offset = int(free.pop())
        put_vector(weights.arena, offset, torch.randn(values))
        return offset

    for slot, row in enumerate(widths):
        weights.activation[slot] = slot % len(Activation)
        weights.input_mode[slot] = slot % len(BottleneckInput)
        for layer in range(LAYERS):
            for site, width in enumerate(row):
                at = slot, layer, site
                weights.width[at], weights.scale[at] = width, torch.rand(()) + 0.5
                for table in (weights.down_page, weights.up_page):
                    for index in range(rank_pages(width)):
                        rows = min(RANK_PAGE_ROWS, width - index * RANK_PAGE_ROWS)
                        offset = int(free.pop())
                        table[at][index] = offset
                        is_first = table is weights.down_page
                        put_page(weights.arena, offset, rows, columns, is_first=is_first, size=columns**-0.5)
                if width:
                    weights.down_bias[at], weights.up_bias[at] = bias(width), bias(columns)
    return weights


def activations(tokens: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """stream, hidden, residual."""
    hidden, residual = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, columns)
    return residual + hidden, hidden, residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("columns", [8, 33, 64, 576])
def test_every_activation_and_input_against_the_reference(dtype: torch.dtype, arena: torch.dtype, columns: int) -> None:
    widths = [((1, 8, 13, 40)[slot % 4], 5) for slot in range(3 * len(Activation) + 1)]
    weights = make_weights([*widths, (0, 0)], columns, arena)
    slots = torch.randperm(len(widths) + 1).tolist()
    starts = [1]
    for slot in slots:
        starts.append(starts[-1] + (slot * 7) % 19)
    segments = Segments.build(starts, slots)
    stream, hidden, residual = activations(starts[-1] + 2, columns, dtype)
    for site in (0, 1):
        expected, actual = stream.clone(), stream.clone()
        bottleneck_add_reference(expected, hidden, residual, segments, weights, 1, site)
        bottleneck_add(actual, hidden, residual, segments, weights, 1, site)
        assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        assert same_bits(actual[:1], stream[:1])
        assert same_bits(actual[-2:], stream[-2:])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_token_has_the_same_bits_in_every_batch(data: st.DataObject) -> None:
    columns, dtype = data.draw(st.sampled_from([8, 24, 65, 320])), data.draw(st.sampled_from(DTYPES))
    width = st.sampled_from([0, 1, 4, 8, 13, 40])
    weights = make_weights([(data.draw(width), 1) for _ in range(4)], columns, data.draw(st.sampled_from(ARENAS)))
    starts, slots = [0], []
    for length in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)):
        starts.append(starts[-1] + length)
        slots.append(data.draw(st.integers(0, 3)))
    stream, hidden, residual = activations(starts[-1], columns, dtype)
    whole = stream.clone()
    with threads(data.draw(st.integers(1, 3))):
        bottleneck_add(whole, hidden, residual, Segments.build(starts, slots), weights, 0, 0)
    for begin, end, slot in zip(starts, starts[1:], slots, strict=False):
        token = data.draw(st.integers(begin, end - 1))
        row = slice(token, token + 1)
        alone = stream[row].clone()
        bottleneck_add(alone, hidden[row], residual[row], Segments.build([0, 1], [slot]), weights, 0, 0)
        assert same_bits(alone, whole[row])


def test_far_from_zero_nothing_overflows() -> None:
    """Inputs of a thousand: what an activation gives is a number wherever the reference's is one."""
    weights = make_weights([(8, 8)] * len(Activation), 16)
    segments = Segments.build([2 * slot for slot in range(len(Activation) + 1)], list(range(len(Activation))))
    stream, hidden, residual = (x * 1000 for x in activations(2 * len(Activation), 16, torch.float32))
    expected, actual = stream.clone(), stream.clone()
    bottleneck_add_reference(expected, hidden, residual, segments, weights, 0, 0)
    bottleneck_add(actual, hidden, residual, segments, weights, 0, 0)
    assert_close(actual, expected, rtol=1e-4, atol=1e-2)


def test_a_stream_that_cannot_be_written_in_place() -> None:
    weights, segments = make_weights([(1, 1)], 8), Segments.build([0, 4], [0])
    with pytest.raises(ValueError, match="stream: must be contiguous"):
        bottleneck_add(torch.zeros(8, 4).t(), torch.zeros(4, 8), torch.zeros(4, 8), segments, weights, 0, 0)
