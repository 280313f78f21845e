import timeit
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peftserve_kernels import RANK_PAGE_ROWS, LoraSlice, LoraWeights, Segments, rank_pages
from peftserve_kernels.cpu.lora import lora_add
from peftserve_kernels.lora import lora_add_reference
from tests.kernels.native import ISAS, isa, same_bits, threads
from tests.kernels.rank_page_writer import fill_with_nan, put_page, put_vector, room

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARENAS = [*DTYPES, torch.int8]
LAYERS = 2


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


def make_slices(columns: int, outs: Sequence[int]) -> tuple[LoraSlice, ...]:
    return tuple(LoraSlice(target, columns, sum(outs[:target]), out) for target, out in enumerate(outs))


def make_weights(
    ranks: Sequence[Sequence[int]],
    slices: Sequence[LoraSlice],
    dtype: torch.dtype = torch.float32,
    row_scaled: Collection[int] = (),
) -> LoraWeights:
    """ranks[slot][target]; every layer has factors of its own in pages of random order, rows past the rank are NaN.

    The slots in `row_scaled` have row scales, as DoRAs do.
    """
    width = max(max(piece.in_features, piece.out_features) for piece in slices)
    pages = rank_pages(max(max(row) for row in ranks)) or 1
    total = LAYERS * sum(2 * rank_pages(rank) + 1 for row in ranks for rank in row) + 1
    page = room(width, dtype)
    weights = LoraWeights.empty(
        elements=total * page, slots=len(ranks), layers=LAYERS, targets=len(slices), pages=pages, dtype=dtype
    )
    fill_with_nan(weights.arena)
    free = (torch.randperm(total) * page).tolist()
    for slot, row in enumerate(ranks):
        for layer in range(LAYERS):
            for target, rank in enumerate(row):
                at = slot, layer, target
                weights.rank[at], weights.scale[at] = rank, torch.rand(()) + 0.5
                features = slices[target].in_features, slices[target].out_features
                for table, size in zip((weights.a_page, weights.b_page), features, strict=True):
                    for index in range(rank_pages(rank)):
                        offset = free.pop()
                        rows = min(RANK_PAGE_ROWS, rank - index * RANK_PAGE_ROWS)
                        table[at][index] = offset
                        put_page(weights.arena, offset, rows, size, is_first=table is weights.a_page)
                if rank and slot in row_scaled:
                    offset = free.pop()
                    weights.row_scale[at] = offset
                    excess, shift = torch.rand(features[1]) - 0.5, torch.randn(features[1])
                    put_vector(weights.arena, offset, torch.cat([excess, shift]))
    return weights


def assert_near(y: Tensor, reference: Tensor, float32_place: float = 1e-6) -> None:
    size = float(reference.float().abs().max())
    place = float32_place if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    assert y.dtype == reference.dtype
    assert_close(y.float() / size, reference.float() / size, rtol=0.0, atol=2 * place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize(
    ("columns", "outs"),
    [(1, (1,)), (7, (5, 3)), (33, (65, 1, 16)), (64, (64,)), (97, (130, 31)), (576, (576, 192, 192))],
)
def test_against_the_reference(dtype: torch.dtype, arena: torch.dtype, columns: int, outs: tuple[int, ...]) -> None:
    slices = make_slices(columns, outs)
    ranks = [[(1, 8, 9)[(slot + target) % 3] for target in range(len(outs))] for slot in range(3)]
    weights = make_weights([*ranks, [64] * len(outs), [0] * len(outs)], slices, arena, row_scaled=(1, 3))
    segments = Segments.build([1, 2, 4, 4, 21, 24, 61], [0, 3, 1, 1, 4, 2])
    x, y = torch.randn(63, columns).to(dtype), torch.randn(63, sum(outs)).to(dtype)
    expected = y.clone()
    lora_add_reference(expected, x, segments, weights, 1, slices)
    before = y.clone()
    lora_add(y, x, segments, weights, 1, slices)
    assert_near(y, expected)
    for untouched in (slice(0, 1), slice(21, 24), slice(61, 63)):
        assert same_bits(y[untouched], before[untouched])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_token_has_the_same_bits_in_every_batch(data: st.DataObject) -> None:
    columns = data.draw(st.sampled_from([1, 24, 65, 576]))
    outs = data.draw(st.lists(st.sampled_from([1, 16, 40, 192]), min_size=1, max_size=3))
    dtype, arena = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(ARENAS))
    slices = make_slices(columns, outs)
    rank = st.sampled_from([0, 1, 3, 4, 8, 13, 64])
    weights = make_weights([[data.draw(rank) for _ in outs] for _ in range(3)], slices, arena, row_scaled=(1,))
    starts, slots = [0], []
    for length in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)):
        starts.append(starts[-1] + length)
        slots.append(data.draw(st.integers(0, 2)))
    x, y = torch.randn(starts[-1], columns).to(dtype), torch.randn(starts[-1], sum(outs)).to(dtype)
    whole = y.clone()
    with threads(data.draw(st.integers(1, 3))):
        lora_add(whole, x, Segments.build(starts, slots), weights, 1, slices)
    for begin, end, slot in zip(starts, starts[1:], slots, strict=False):
        token = data.draw(st.integers(begin, end - 1))
        alone = y[token : token + 1].clone()
        for piece in data.draw(st.permutations(slices)):
            lora_add(alone, x[token : token + 1], Segments.build([0, 1], [slot]), weights, 1, (piece,))
        assert same_bits(alone, whole[token : token + 1])


def test_a_broken_token_disturbs_no_other() -> None:
    slices = make_slices(64, (64, 32))
    weights = make_weights([[8, 16], [4, 1]], slices)
    segments = Segments.build([0, 9, 20], [0, 1])
    x, y = torch.randn(20, 64), torch.randn(20, 96)
    clean, broken = y.clone(), y.clone()
    lora_add(clean, x, segments, weights, 0, slices)
    x[4] = torch.nan
    lora_add(broken, x, segments, weights, 0, slices)
    assert broken[4].isnan().all()
    rest = [i for i in range(20) if i != 4]
    assert same_bits(broken[rest], clean[rest])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_scale_of_one_is_none(dtype: torch.dtype) -> None:
    slices = make_slices(40, (33, 8))
    weights = make_weights([[8, 3]], slices, dtype)
    segments = Segments.build([0, 5], [0])
    x, y = torch.randn(5, 40).to(dtype), torch.randn(5, 41).to(dtype)
    plain = y.clone()
    lora_add(plain, x, segments, weights, 0, slices)
    unit = replace(weights, arena=torch.cat([weights.arena, torch.zeros(2 * 33, dtype=dtype)]))
    unit.row_scale.fill_(len(weights.arena))
    lora_add(y, x, segments, unit, 0, slices)
    assert same_bits(y, plain)


def test_an_output_that_cannot_be_written_in_place() -> None:
    slices = make_slices(8, (8,))
    weights, segments = make_weights([[1]], slices), Segments.build([0, 4], [0])
    with pytest.raises(ValueError, match="y must be contiguous"):
        lora_add(torch.zeros(8, 4).t(), torch.zeros(4, 8), segments, weights, 0, slices)
    with pytest.raises(ValueError, match="of x's dtype"):
        lora_add(torch.zeros(4, 8), torch.zeros(4, 8).bfloat16(), segments, weights, 0, slices)


def test_what_a_call_costs(capsys: pytest.CaptureFixture[str]) -> None:
    slices = make_slices(64, (64, 16, 16))
    weights, segments = make_weights([[1, 1, 1]], slices), Segments.build([0, 1], [0])
    x, y = torch.zeros(1, 64), torch.zeros(1, 96)
    times = timeit.repeat(lambda: lora_add(y, x, segments, weights, 0, slices), number=200, repeat=5)
    with capsys.disabled():
        print(f"\nlora_add, one token and three slices of rank 1: {min(times) / 200 * 1e6:.1f} us a call")  # noqa: T201
    assert not y.any()
