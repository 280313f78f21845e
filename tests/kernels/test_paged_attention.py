from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from peftserve_kernels import AttentionBatch, paged_attention
from peftserve_kernels.paged_attention import QUERY_TILE, cut_queries, paged_attention_reference
from tests.kernels.rounding import assert_rounded_once

HEAD_DIM = 16
SCALE = 0.3


@dataclass
class Sequences:
    """Random sequences, whole and as the server holds them: pages in random order, stale positions NaN."""

    q: list[Tensor]  # [n, H, hd], the last n positions
    k: list[Tensor]  # [context, KV, hd]
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_tables: list[list[int]]

    def batch(self) -> AttentionBatch:
        starts = [0]
        for q in self.q:
            starts.append(starts[-1] + len(q))
        return AttentionBatch.build(self.block_tables, starts, [len(k) for k in self.k])


def make(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shared_prefix: int = 0,
) -> Sequences:
    """`lengths`: (queries, context) a sequence. The first `shared_prefix` positions lie in the same pages for all."""
    prefix_k, prefix_v = torch.randn(2, shared_prefix, kv_heads, HEAD_DIM).to(dtype).unbind()
    needed = sum(-(-context // page_size) for _, context in lengths) + -(-shared_prefix // page_size) + 2
    shape = (needed, kv_heads, page_size, HEAD_DIM)
    k_cache, v_cache = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    free = torch.randperm(needed).tolist()
    full_prefix_pages = [free.pop() for _ in range(shared_prefix // page_size)]
    made = Sequences([], [], [], k_cache, v_cache, [])
    for queries, context in lengths:
        k, v = torch.randn(2, context, kv_heads, HEAD_DIM).to(dtype).unbind()
        if shared_prefix:
            k, v = torch.cat((prefix_k, k[shared_prefix:])), torch.cat((prefix_v, v[shared_prefix:]))
        pages = [*full_prefix_pages]
        while len(pages) * page_size < context:
            pages.append(free.pop())
        for position in range(context):
            k_cache[pages[position // page_size], :, position % page_size] = k[position]
            v_cache[pages[position // page_size], :, position % page_size] = v[position]
        made.q.append(torch.randn(queries, heads, HEAD_DIM).to(dtype))
        made.k.append(k)
        made.v.append(v)
        made.block_tables.append(pages)
    return made


def oracle(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """torch's attention over the whole sequence with KV heads repeated and an explicit mask, in float64."""
    queries, context = len(q), len(k)
    position = torch.arange(context - queries, context)[:, None]
    mask = torch.arange(context) <= position
    if window is not None:
        mask &= torch.arange(context) > position - window
    repeat = q.shape[1] // k.shape[1]
    whole_k = k.double().repeat_interleave(repeat, dim=1).transpose(0, 1)
    whole_v = v.double().repeat_interleave(repeat, dim=1).transpose(0, 1)
    out = scaled_dot_product_attention(q.double().transpose(0, 1), whole_k, whole_v, attn_mask=mask, scale=SCALE)
    return out.transpose(0, 1).flatten(1)


def check(made: Sequences, window: int | None = None) -> None:
    q = torch.cat(made.q)
    out = paged_attention(q, made.k_cache, made.v_cache, made.batch(), SCALE, window)
    assert out.dtype == q.dtype
    wanted = torch.cat([oracle(q, k, v, window) for q, k, v in zip(made.q, made.k, made.v, strict=True)])
    assert_rounded_once(out, wanted)


DECODE = [(1, 1), (1, 2), (1, 15), (1, 16), (1, 17), (1, 100), (1, 3)]
PREFILL = [(1, 1), (5, 5), (16, 16), (33, 33)]
MIXED = [(1, 40), (7, 7), (3, 50), (1, 41), (20, 64), (0, 9), (1, 39)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (5, 1)])
@pytest.mark.parametrize("lengths", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
def test_against_torch(
    dtype: torch.dtype, page_size: int, heads: int, kv_heads: int, lengths: list[tuple[int, int]]
) -> None:
    check(make(lengths, heads=heads, kv_heads=kv_heads, page_size=page_size, dtype=dtype))


@pytest.mark.parametrize("window", [1, 4, 16, 1000])
@pytest.mark.parametrize("page_size", [1, 16])
def test_sliding_window(window: int, page_size: int) -> None:
    check(make(MIXED, page_size=page_size), window)


@pytest.mark.parametrize("window", [None, 50])
def test_a_prefill_longer_than_a_block_of_queries(window: int | None) -> None:
    check(make([(300, 300), (129, 200), (1, 300)]), window)


@pytest.mark.parametrize("virtual_tokens", [1, 20, 100])
def test_a_prefix_adapters_pages_are_shared(virtual_tokens: int) -> None:
    contexts = [(4, virtual_tokens + 4), (1, virtual_tokens + 30), (1, virtual_tokens + 1)]
    check(make(contexts, shared_prefix=virtual_tokens))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(
        st.integers(1, 70).flatmap(lambda context: st.tuples(st.integers(0, context), st.just(context))), max_size=8
    ),
    page_size=st.sampled_from([1, 3, 16]),
    window=st.none() | st.integers(1, 80),
)
def test_any_batch(lengths: list[tuple[int, int]], page_size: int, window: int | None) -> None:
    made = make([*lengths, (1, 5)], page_size=page_size)
    check(made, window)


@pytest.mark.parametrize("chunks", [[50], [1] * 50, [7, 16, 1, 26], [49, 1]])
@pytest.mark.parametrize("window", [None, 9])
def test_chunked_prefill_equals_the_whole(chunks: list[int], window: int | None) -> None:
    made = make([(50, 50)])
    whole = paged_attention(made.q[0], made.k_cache, made.v_cache, made.batch(), SCALE, window)
    done, parts = 0, []
    for chunk in chunks:
        batch = AttentionBatch.build(made.block_tables, [0, chunk], [done + chunk])
        queries = made.q[0][done : done + chunk]
        parts.append(paged_attention(queries, made.k_cache, made.v_cache, batch, SCALE, window))
        done += chunk
    assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_rows_past_the_last_sequence_are_zero() -> None:
    made = make([(2, 5)])
    q = torch.cat([*made.q, torch.randn(3, 4, HEAD_DIM)])
    out = paged_attention(q, made.k_cache, made.v_cache, made.batch(), SCALE)
    assert out.shape == (5, 4 * HEAD_DIM)
    assert out[:2].all()
    assert not out[2:].any()


def test_an_empty_batch() -> None:
    caches = torch.zeros(2, 2, 2, 4, HEAD_DIM)
    out = paged_attention(torch.zeros(0, 4, HEAD_DIM), caches[0], caches[1], AttentionBatch.build([], [0], []), SCALE)
    assert out.shape == (0, 4 * HEAD_DIM)


def test_one_batch_serves_layers_with_and_without_a_window() -> None:
    made = make(MIXED)
    batch, q = made.batch(), torch.cat(made.q)
    for window in (None, 8, None):
        out = paged_attention(q, made.k_cache, made.v_cache, batch, SCALE, window)
        fresh = paged_attention(q, made.k_cache, made.v_cache, made.batch(), SCALE, window)
        assert torch.equal(out, fresh)


def test_unused_rows_of_a_captured_step_are_zero() -> None:
    made = make([(1, 40)])
    batch = AttentionBatch.for_decode(3, 4)
    batch.block_tables[1, : len(made.block_tables[0])] = torch.tensor(made.block_tables[0])
    batch.context_len[1] = 40
    out = paged_attention_reference(made.q[0].expand(3, -1, -1), made.k_cache, made.v_cache, batch, SCALE)
    assert_rounded_once(out[1:2], oracle(made.q[0], made.k[0], made.v[0], None))
    assert not out[::2].any()


@given(lengths=st.lists(st.integers(0, 4 * QUERY_TILE) | st.just(1), max_size=12))
def test_queries_are_cut_into_decode_and_tiles(lengths: list[int]) -> None:
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    decode, prefill = cut_queries(starts)
    assert (decode.dtype, prefill.dtype) == (np.int32, np.int32)
    assert decode.tolist() == [sequence for sequence, count in enumerate(lengths) if count == 1]
    covered = [(sequence, token) for sequence, first, end in prefill.tolist() for token in range(first, end)]
    assert covered == [
        (sequence, starts[sequence] + query)
        for sequence, count in enumerate(lengths)
        for query in range(count)
        if count > 1
    ]
    assert all(0 < end - first <= QUERY_TILE for _, first, end in prefill.tolist())
    assert all((first - starts[sequence]) % QUERY_TILE == 0 for sequence, first, _ in prefill.tolist())


def test_faults() -> None:
    q, cache = torch.zeros(1, 4, 8), torch.zeros(2, 2, 16, 8)
    batch = AttentionBatch.build([[0]], [0, 1], [1])
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(torch.zeros(1, 4, 6), cache, cache, batch, SCALE)
    with pytest.raises(ValueError, match="3 heads are no multiple of 2"):
        paged_attention(q[:, :3], cache, cache, batch, SCALE)
    with pytest.raises(ValueError, match="sliding_window: must be at least 1, got 0"):
        paged_attention(q, cache, cache, batch, SCALE, 0)
    with pytest.raises(ValueError, match="2 contexts need 2 block tables"):
        AttentionBatch.build([[0]], [0, 1, 2], [1, 1])
    with pytest.raises(ValueError, match="sequence 1: 3 queries in a context of 2"):
        AttentionBatch.build([[0], [1]], [0, 1, 4], [1, 2])
