import math
import timeit
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftserve_kernels import AttentionBatch
from peftserve_kernels.cpu.paged_attention import paged_attention
from peftserve_kernels.paged_attention import paged_attention_reference
from tests.kernels.native import ISAS, isa, same_bits, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


@dataclass
class Whole:
    """One sequence, whole: q [context, H, hd]; k, v [context, KV, hd]."""

    q: Tensor
    k: Tensor
    v: Tensor


def random_sequence(context: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Whole:
    q = torch.randn(context, heads[0], head_dim).to(dtype)
    k, v = torch.randn(2, context, heads[1], head_dim).to(dtype).unbind()
    return Whole(q, k, v)


def attend(
    parts: Sequence[tuple[Whole, int, int]], page_size: int, window: int | None = None, *, reference: bool = False
) -> list[Tensor]:
    """Queries first .. end of each sequence, in one call; positions from `end` on are not in the cache yet.

    Pages lie in random order, and what is not written is NaN: pages too that a window has left behind.
    """
    _, kv_heads, head_dim = parts[0][0].k.shape
    needed = sum(-(-end // page_size) for _, _, end in parts) + 1
    caches = torch.full((2, needed, kv_heads, page_size, head_dim), torch.nan, dtype=parts[0][0].k.dtype)
    free = torch.randperm(needed).tolist()
    tables, starts, queries = [], [0], []
    for sequence, first, end in parts:
        pages = [free.pop() for _ in range(-(-end // page_size))]
        positions = torch.arange(0 if window is None else max(0, first - window + 1), end)
        page, offset = torch.tensor(pages)[positions // page_size], positions % page_size
        caches[0, page, :, offset], caches[1, page, :, offset] = sequence.k[positions], sequence.v[positions]
        tables.append(pages)
        starts.append(starts[-1] + end - first)
        queries.append(sequence.q[first:end])
    batch = AttentionBatch.build(tables, starts, [end for _, _, end in parts])
    q = torch.cat([*queries, torch.randn_like(queries[0][:1]).expand(2, -1, -1)])
    op = paged_attention_reference if reference else paged_attention
    out = op(q, caches[0], caches[1], batch, head_dim**-0.5, window)
    assert not out[starts[-1] :].any()  # padding
    return [out[a:b] for a, b in pairwise(starts)]


def assert_near(actual: Tensor, reference: Tensor) -> None:
    """Both round float32 sums once: at most one place apart."""
    place = 1e-5 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), reference.float(), rtol=place, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 24, 64, 128])
@pytest.mark.parametrize(("heads", "window"), [((4, 4), None), ((9, 3), None), ((5, 1), 9), ((9, 3), 70)])
def test_against_the_reference(dtype: torch.dtype, head_dim: int, heads: tuple[int, int], window: int | None) -> None:
    lengths = [(0, 1), (0, 5), (63, 64), (64, 65), (40, 150), (199, 200), (3, 3)]
    parts = [(random_sequence(end, heads, head_dim, dtype), first, end) for first, end in lengths]
    for page_size in (1, 3, 16):
        wanted = attend(parts, page_size, window, reference=True)
        for actual, expected in zip(attend(parts, page_size, window), wanted, strict=True):
            assert_near(actual, expected)


@pytest.mark.parametrize("cache", DTYPES)
def test_a_cache_of_another_dtype(cache: torch.dtype) -> None:
    sequence = random_sequence(70, (6, 2), 32, cache)
    sequence.q = sequence.q.bfloat16()
    (actual,), (expected,) = (attend([(sequence, 60, 70)], 16, reference=r) for r in (False, True))
    assert actual.dtype == torch.bfloat16
    assert_near(actual, expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_however_it_is_computed(data: st.DataObject) -> None:
    """Whole prefills alone against chunks and decode steps beside other sequences, in other pages and teams."""
    heads = data.draw(st.sampled_from([(4, 4), (9, 3), (5, 1), (70, 1)]))
    head_dim = data.draw(st.sampled_from([2, 24, 64, 72]))
    dtype = data.draw(st.sampled_from(DTYPES))
    window = data.draw(st.none() | st.integers(1, 150))
    page_size = st.sampled_from([1, 3, 16, 64])
    contexts = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    sequences = [random_sequence(context, heads, head_dim, dtype) for context in contexts]
    whole = [attend([(s, 0, len(s.q))], data.draw(page_size), window)[0] for s in sequences]
    parts = []
    for index in data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=8)):
        end = data.draw(st.integers(1, contexts[index]))
        parts.append((index, data.draw(st.just(end - 1) | st.integers(0, end - 1)), end))
    with threads(data.draw(st.integers(1, 3))):
        outputs = attend([(sequences[i], first, end) for i, first, end in parts], data.draw(page_size), window)
    for (index, first, end), out in zip(parts, outputs, strict=True):
        assert same_bits(out, whole[index][first:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_sequence_disturbs_no_other(dtype: torch.dtype) -> None:
    sequences = [random_sequence(context, (9, 3), 64, dtype) for context in (30, 90, 200)]
    parts = [(sequence, 20, len(sequence.q)) for sequence in sequences]
    clean = attend(parts, 16)
    sequences[1].q[25:] = torch.inf
    sequences[1].v[10] = torch.nan
    broken = attend(parts, 16)
    assert broken[1].isnan().any()
    assert same_bits(broken[0], clean[0])
    assert same_bits(broken[2], clean[2])


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_weights_that_are_flat_or_peaked(size: float) -> None:
    """Scores around 0 and in the hundreds: nothing overflows, and the largest always counts."""
    sequence = random_sequence(300, (4, 2), 64, torch.float32)
    sequence.q *= size
    (actual,), (expected,) = (attend([(sequence, 0, 300)], 16, reference=r) for r in (False, True))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_no_queries_at_all() -> None:
    caches = torch.full((2, 2, 2, 4, 16), torch.nan)
    batch = AttentionBatch.build([[0], [1]], [0, 0, 0], [3, 4])
    assert paged_attention(torch.zeros(0, 4, 16), caches[0], caches[1], batch, 1.0).shape == (0, 64)
    empty = AttentionBatch.build([], [0], [])
    assert not paged_attention(torch.ones(3, 4, 16), caches[0], caches[1], empty, 1.0).any()


def test_what_a_call_costs(capsys: pytest.CaptureFixture[str]) -> None:
    caches = torch.zeros(2, 4, 3, 16, 64).bfloat16()
    batch, q = AttentionBatch.build([[0]], [0, 1], [1]), torch.zeros(1, 9, 64).bfloat16()
    times = timeit.repeat(lambda: paged_attention(q, caches[0], caches[1], batch, 0.125), number=200, repeat=5)
    with capsys.disabled():
        print(f"\npaged_attention, one query and one key: {min(times) / 200 * 1e6:.1f} us a call")  # noqa: T201
    assert math.isfinite(min(times))
