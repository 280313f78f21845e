from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftserve_kernels import AttentionBatch
from peftserve_kernels.gpu.decode_splits import MOST_SPLITS, SPLIT, max_splits, workspace_bytes
from peftserve_kernels.gpu.launch import TARGETS, Launch, Target, recording, watching
from peftserve_kernels.gpu.paged_attention import attention_choice, paged_attention
from peftserve_kernels.paged_attention import QUERY_TILE, paged_attention_reference
from tests.kernels.interpreter import rows_alike
from tests.kernels.test_paged_attention import DECODE, MIXED, PREFILL, SCALE, make

# Decode contexts at the edges of a split, and a prefill longer than a tile beside them.
LONG_DECODE = [(1, SPLIT), (1, SPLIT + 1), (1, 3 * SPLIT - 1), (1, 7)]
LONG_MIXED = [(QUERY_TILE + 2, QUERY_TILE + 70), (1, SPLIT + 5), (2, 2)]


def assert_near(actual: Tensor, reference: Tensor) -> None:
    """bf16 and fp16 round the weights too: an error relative to the largest value, not to a sum that cancels."""
    assert actual.dtype == reference.dtype
    place = 1e-5 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), reference.float(), rtol=2 * place, atol=2 * place)


def attend(
    lengths: Sequence[tuple[int, int]],
    window: int | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    page_size: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    shared_prefix: int = 0,
) -> None:
    made = make(lengths, heads=heads, kv_heads=kv_heads, page_size=page_size, dtype=dtype, shared_prefix=shared_prefix)
    arguments = (torch.cat(made.q), made.k_cache, made.v_cache, made.batch(), SCALE, window)
    assert_near(paged_attention(*arguments), paged_attention_reference(*arguments))


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads"),
    [
        (torch.float32, 2, 1),
        (torch.bfloat16, 9, 3),
        (torch.float16, 5, 1),
        pytest.param(torch.float32, 9, 3, marks=pytest.mark.slow),
        pytest.param(torch.float16, 34, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("lengths", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
def test_against_the_reference(dtype: torch.dtype, heads: int, kv_heads: int, lengths: list[tuple[int, int]]) -> None:
    attend(lengths, dtype=dtype, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("page_size", [1, 3, 64, 256])
def test_pages_of_any_size(page_size: int) -> None:
    attend(MIXED, page_size=page_size)


@pytest.mark.parametrize("window", [1, 9, 16, 1000])
def test_sliding_window(window: int) -> None:
    attend(MIXED, window, page_size=3)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(torch.float32, None), (torch.bfloat16, 1), (torch.float16, SPLIT), (torch.float16, SPLIT + 2)],
)
def test_contexts_longer_than_a_split(dtype: torch.dtype, window: int | None) -> None:
    attend(LONG_DECODE, window, dtype=dtype, page_size=64)


@pytest.mark.parametrize("window", [None, 50])
def test_prefill_longer_than_a_tile(window: int | None) -> None:
    attend(LONG_MIXED, window, page_size=64)


@pytest.mark.parametrize("virtual_tokens", [1, 20, 100])
def test_a_prefix_adapters_pages_are_shared(virtual_tokens: int) -> None:
    attend([(4, virtual_tokens + 4), (1, virtual_tokens + 30), (1, virtual_tokens + 1)], shared_prefix=virtual_tokens)


def test_few_programs_for_many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that has several splits gives the bits of programs that have one each."""
    made = make([(1, 5 * SPLIT), (1, 3)], page_size=64, dtype=torch.float16)
    arguments = (torch.cat(made.q), made.k_cache, made.v_cache, made.batch(), SCALE)
    whole = paged_attention(*arguments)
    monkeypatch.setattr("peftserve_kernels.gpu.paged_attention._DECODE_PROGRAMS", 5)
    with watching() as launches:
        assert torch.equal(paged_attention(*arguments), whole)
    assert launches[0].grid == (4, 2)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float32), (7, torch.bfloat16), (24, torch.float32), (80, torch.float16), (200, torch.bfloat16)],
)
def test_any_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.randn(2, 9, 2, 16, head_dim).to(dtype).unbind()
    batch = AttentionBatch.build([[3, 1, 7], [0, 8], [2]], [0, 5, 6, 8], [40, 20, 2])
    q = torch.randn(8, 6, head_dim).to(dtype)
    arguments = (q, k_cache, v_cache, batch, head_dim**-0.5)
    assert_near(paged_attention(*arguments), paged_attention_reference(*arguments))


def test_a_cache_of_another_dtype() -> None:
    k_cache, v_cache = torch.randn(2, 9, 2, 16, 32).unbind()
    batch, q = AttentionBatch.build([[3, 1], [0]], [0, 5, 6], [30, 9]), torch.randn(6, 4, 32).bfloat16()
    arguments = (q, k_cache, v_cache, batch, 0.2)
    assert_near(paged_attention(*arguments), paged_attention_reference(*arguments))


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(
        st.integers(1, 70).flatmap(lambda context: st.tuples(st.integers(0, context), st.just(context))), max_size=5
    ),
    page_size=st.sampled_from([1, 3, 16]),
    window=st.none() | st.integers(1, 80),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_batch(lengths: list[tuple[int, int]], page_size: int, window: int | None, dtype: torch.dtype) -> None:
    attend([*lengths, (1, 5)], window, page_size=page_size, dtype=dtype)


@st.composite
def long_batches(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Heads and KV heads; contexts of up to three splits, each with as many queries as the interpreter has time for."""
    heads = draw(st.sampled_from([(2, 2), (3, 1), (9, 3), (35, 1)]))
    most = 130 // heads[0]  # rows of several programs, but fewer queries than QUERY_TILE
    context = st.integers(1, 3 * SPLIT)
    length = context.flatmap(lambda c: st.tuples(st.just(1) | st.integers(0, min(c, most)), st.just(c)))
    return heads, draw(st.lists(length, max_size=4))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    batch=long_batches(),
    page_size=st.sampled_from([1, 3, 16, 64, 256]),
    window=st.none() | st.integers(1, 800),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_long_batch(
    batch: tuple[tuple[int, int], list[tuple[int, int]]], page_size: int, window: int | None, dtype: torch.dtype
) -> None:
    (heads, kv_heads), lengths = batch
    attend([*lengths, (1, 5)], window, page_size=page_size, dtype=dtype, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_has_the_same_bits_beside_others_and_in_any_chunk(window: int | None) -> None:
    """Decode rows and rows of prefill, each among their own: the two differ in the order of their sums."""
    with rows_alike():
        check_rows_beside_others(window)


def check_rows_beside_others(window: int | None) -> None:
    made = make([(60, 60), (1, 300), (9, 33)], page_size=16, dtype=torch.float16)
    q = torch.cat(made.q)
    mixed = paged_attention(q, made.k_cache, made.v_cache, made.batch(), SCALE, window)

    def alone(sequence: int, first: int, end: int, context: int) -> Tensor:
        batch = AttentionBatch.build([made.block_tables[sequence]], [0, end - first], [context])
        return paged_attention(made.q[sequence][first:end], made.k_cache, made.v_cache, batch, SCALE, window)

    assert torch.equal(mixed[60:61], alone(1, 0, 1, 300))
    assert torch.equal(mixed[61:], alone(2, 0, 9, 33))
    for first, end in ((0, 60), (0, 7), (7, 40), (40, 60)):
        assert torch.equal(mixed[first:end], alone(0, first, end, end))


def test_rows_of_a_captured_step() -> None:
    """Unused rows are zeros whatever lies in page 0, and used ones are those of an ordinary step."""
    made = make([(1, 40), (1, 300), (1, 3)], page_size=16, dtype=torch.float16)
    page = next(page for page in range(len(made.k_cache)) if not any(page in table for table in made.block_tables))
    batch = AttentionBatch.for_decode(6, 20)
    batch.block_tables.fill_(page)  # its keys and values are NaN
    for row, (table, context) in enumerate(zip(made.block_tables, (40, 300, 3), strict=True)):
        batch.block_tables[2 * row, : len(table)] = torch.tensor(table)
        batch.context_len[2 * row] = context
    q = torch.randn(6, 4, 16).half()
    q[::2] = torch.cat(made.q)
    out = paged_attention(q, made.k_cache, made.v_cache, batch, SCALE)
    assert torch.equal(out[::2], paged_attention(q[::2], made.k_cache, made.v_cache, made.batch(), SCALE))
    assert not out[1::2].any()
    narrow = replace(AttentionBatch.for_decode(6, 20), block_tables=batch.block_tables[:, :1].contiguous())
    assert not paged_attention(q, made.k_cache, made.v_cache, narrow, SCALE).any()
    assert not paged_attention(q, made.k_cache, made.v_cache, AttentionBatch.for_decode(6, 0), SCALE).any()


def test_unused_tiles_of_prefill() -> None:
    made = make([(5, 9), (20, 20)], page_size=16, dtype=torch.float16)
    batch, q = made.batch(), torch.cat(made.q)
    assert batch.prefill is not None
    padded = replace(batch, prefill=torch.cat((batch.prefill, torch.zeros(3, 3, dtype=torch.int32))))
    arguments = (q, made.k_cache, made.v_cache)
    assert torch.equal(paged_attention(*arguments, padded, SCALE), paged_attention(*arguments, batch, SCALE))


def test_rows_past_the_last_sequence_are_zero() -> None:
    made = make([(2, 5), (1, 5)], dtype=torch.float16)
    q = torch.cat([*made.q, torch.randn(3, 4, 16).half()])
    out = paged_attention(q, made.k_cache, made.v_cache, made.batch(), SCALE)
    assert out[:3].all()
    assert not out[3:].any()


def test_weights_that_are_flat_or_peaked() -> None:
    made = make([(6, 30), (1, 100)], heads=2, kv_heads=1)
    for size in (1e-3, 100.0):
        q = torch.cat(made.q) * size
        arguments = (q, made.k_cache, made.v_cache, made.batch(), SCALE)
        torch.testing.assert_close(
            paged_attention(*arguments), paged_attention_reference(*arguments), rtol=1e-3, atol=1e-3
        )


def test_faults() -> None:
    q, cache, batch = torch.zeros(1, 4, 8), torch.zeros(2, 2, 16, 8), AttentionBatch.build([[0]], [0, 1], [1])
    strided = torch.zeros(2, 2, 16, 16)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        paged_attention(q, strided, strided, batch, SCALE)
    with pytest.raises(ValueError, match="scale: must be positive, got -1"):
        paged_attention(q, cache, cache, batch, -1.0)
    with pytest.raises(ValueError, match="no queries cut"):
        paged_attention(q, cache, cache, replace(batch, decode=None), SCALE)


def record(
    target: Target, batch: AttentionBatch, heads: tuple[int, int] = (32, 8), window: int | None = None, tokens: int = 8
) -> list[Launch]:
    q = torch.empty(tokens, heads[0], 128, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(100, heads[1], 16, 128, dtype=torch.bfloat16, device="meta")
    with recording(target) as launches:
        assert paged_attention(q, cache, cache, batch, 0.1, window).shape == (tokens, heads[0] * 128)
    return launches


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_launches(target: Target) -> None:
    batch = AttentionBatch.for_decode(8, 256, "meta")
    decode, merge = record(target, batch)
    assert decode.name == "decode_attention_kernel"
    assert decode.grid == (64, 16)
    assert merge.grid == (8 * 32,)
    (only,) = record(target, AttentionBatch.for_decode(8, 16, "meta"))
    assert only.grid == (64, 1)
    assert only.constants["ONE_SPLIT"]
    assert record(target, batch, window=1000)[0].grid == (64, 5)
    # more heads to a KV head than a program has rows
    assert record(target, batch, heads=(64, 2))[0].grid == (8 * 2 * 2, 16)
    # many programs anyhow: each takes several splits
    assert record(target, AttentionBatch.for_decode(128, 2048, "meta"), tokens=128)[0].grid == (1024, 4)
    (prefill,) = record(target, AttentionBatch.build([[0] * 30], [0, 300], [400], "meta"), tokens=300)
    assert prefill.grid == (3 * QUERY_TILE * 4 // prefill.constants["ROWS"], 8)
    assert not record(target, AttentionBatch.build([], [0], [], "meta"), tokens=0)


def test_max_splits() -> None:
    assert [max_splits(positions, 0) for positions in (0, 1, SPLIT, SPLIT + 1)] == [1, 1, 1, 2]
    assert [max_splits(9 * SPLIT, window) for window in (1, 2, SPLIT + 1, SPLIT + 2)] == [1, 2, 2, 3]
    assert max_splits(1 << 20, 0) == MOST_SPLITS
    assert max_splits(1 << 20, 1 << 18) == MOST_SPLITS + 1


def test_the_sums_of_splits_are_bounded() -> None:
    target, cache = TARGETS[1], torch.empty(100, 8, 16, 128, dtype=torch.bfloat16, device="meta")
    q = torch.empty(64, 32, 128, dtype=torch.bfloat16, device="meta")
    for blocks, window in ((16, None), (64, None), (8192, None), (65536, None), (65536, 4096)):
        with recording(target) as launches:
            paged_attention(q, cache, cache, AttentionBatch.for_decode(64, blocks, "meta"), 0.1, window)
        sums = launches[0].arguments[4:7]
        taken = sum(x.nbytes for x in sums)
        assert taken == workspace_bytes(64, 32, 128, blocks * 16, window or 0)
        assert taken <= 70 << 20
    assert workspace_bytes(64, 32, 128, 1 << 20, 0) == workspace_bytes(64, 32, 128, 1 << 17, 0)


@pytest.mark.parametrize(("window", "splits"), [(None, 2), (900, 3), (SPLIT + 1, 2)])
def test_long_contexts_have_longer_splits_of_their_own(
    monkeypatch: pytest.MonkeyPatch, window: int | None, splits: int
) -> None:
    """A row's splits depend neither on longer rows beside it nor on the width of the tables."""
    for module in ("decode_splits", "paged_attention"):
        monkeypatch.setattr(f"peftserve_kernels.gpu.{module}.MOST_SPLITS", 2)
    lengths = [(1, 3 * SPLIT), (1, 7 * SPLIT + 9), (1, 2 * SPLIT), (1, SPLIT), (1, 3)]
    made = make(lengths, page_size=64, dtype=torch.float16)
    q = torch.cat(made.q)
    arguments = (q, made.k_cache, made.v_cache, made.batch(), SCALE, window)
    with watching() as launches:
        together = paged_attention(*arguments)
    assert launches[0].arguments[4].shape[2] == splits
    assert_near(together, paged_attention_reference(*arguments))
    for row, (_, context) in enumerate(lengths):
        batch = AttentionBatch.build([made.block_tables[row]], [0, 1], [context])
        alone = paged_attention(made.q[row], made.k_cache, made.v_cache, batch, SCALE, window)
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 64, 80, 128, 256])
def test_choices_fit(target: Target, dtype: torch.dtype, head_dim: int) -> None:
    limit = {80: 163, 90: 227, 100: 227, "gfx942": 64}[target.arch] << 10
    padded = max(16, 1 << (head_dim - 1).bit_length())
    for choice in attention_choice(target, dtype, head_dim):
        assert choice.rows >= 16
        assert SPLIT % choice.keys == 0
        buffers = max((choice.num_stages - 1) // 2, 1)
        assert (choice.rows + 2 * buffers * choice.keys) * padded * dtype.itemsize < limit


def test_no_choice() -> None:
    with pytest.raises(ValueError, match="no attention kernel"):
        attention_choice(Target("cuda", 90), torch.float32, 1000)
