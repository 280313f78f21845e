from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peftserve_kernels import RANK_PAGE_ROWS, LoraSlice, LoraWeights, Segments, lora_add, rank_pages
from tests.kernels.rank_page_writer import write_rank_rows

IN, LAYERS, MAX_RANK = 24, 2, 64
OUTS = (40, 8, 16)  # q, k, v of a merged layer, with GQA
SLICES = tuple(LoraSlice(target, IN, sum(OUTS[:target]), out) for target, out in enumerate(OUTS))


@dataclass
class Bank:
    """LoRA adapters as the server holds them, and as dense deltas scale * B A [out, in] by (slot, layer, target)."""

    weights: LoraWeights
    deltas: dict[tuple[int, int, int], Tensor]

    def merged(self, slot: int, layer: int) -> Tensor:
        parts = [self.deltas.get((slot, layer, t), torch.zeros(out, IN)) for t, out in enumerate(OUTS)]
        return torch.cat(parts)


def make_bank(ranks: list[list[int]], dtype: torch.dtype = torch.float32) -> Bank:
    """ranks[slot][target], the same in all layers; pages are handed out in random order, between them NaN."""
    pages_each = rank_pages(MAX_RANK)
    page_elements = RANK_PAGE_ROWS * max(IN, *OUTS)
    total = sum(2 * rank_pages(r) for slot in ranks for r in slot) * LAYERS + 4
    weights = LoraWeights.empty(
        elements=total * page_elements,
        slots=len(ranks),
        layers=LAYERS,
        targets=len(OUTS),
        pages=pages_each,
        dtype=dtype,
    )
    weights.arena.fill_(torch.nan)
    free = (torch.randperm(total) * page_elements).tolist()
    deltas = {}
    for slot, targets in enumerate(ranks):
        for layer in range(LAYERS):
            for target, rank in enumerate(targets):
                at = (slot, layer, target)
                a, b = torch.randn(rank, IN).to(dtype), torch.randn(OUTS[target], rank).to(dtype)
                scale = float(torch.rand(())) + 0.5
                for table, rows in ((weights.a_page, a), (weights.b_page, b.t())):
                    pages = [free.pop() for _ in range(rank_pages(rank))]
                    table[at][: len(pages)] = torch.tensor(pages)
                    write_rank_rows(weights.arena, pages, rows)
                weights.rank[at] = rank
                weights.scale[at] = scale
                if rank:
                    deltas[at] = scale * b.float() @ a.float()
    return Bank(weights, deltas)


def check(bank: Bank, segments: Segments, tokens: int, layer: int = 1) -> None:
    """A dense layer with the delta merged into its weight, token by token, is the oracle."""
    base = torch.randn(sum(OUTS), IN)
    x = torch.randn(tokens, IN)
    y = x @ base.t()
    oracle = y.clone()
    for start, end, slot in segments.bounds:
        for token in range(start, end):
            oracle[token] = (base + bank.merged(slot, layer)) @ x[token]
    lora_add(y, x, segments, bank.weights, layer, SLICES)
    assert_close(y, oracle, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return make_bank([[1, 4, 8], [16, 0, 64], [0, 0, 0], [9, 7, 17]])


@pytest.mark.parametrize(
    ("start", "slot", "tokens"),
    [
        pytest.param([0], [], 0, id="nothing"),
        pytest.param([0], [], 5, id="base only"),
        pytest.param([0, 1], [3], 1, id="one token"),
        pytest.param([2, 6], [1], 9, id="base tokens on both sides"),
        pytest.param([0, 1, 2, 3, 4], [0, 1, 2, 3], 4, id="distinct, one token each"),
        pytest.param([0, 3, 5, 12], [3, 3, 3], 12, id="identical"),
        pytest.param([0, 1, 2, 40], [1, 0, 3], 41, id="skewed"),
        pytest.param([0, 0, 7, 7, 7], [0, 1, 3, 2], 7, id="empty segments"),
        pytest.param([1, 17, 25, 29, 31], [0, 1, 3, 2], 33, id="zipf"),
        pytest.param([0, 5], [2], 5, id="rank 0 everywhere"),
    ],
)
def test_equals_merged_weights(bank: Bank, start: list[int], slot: list[int], tokens: int) -> None:
    check(bank, Segments.build(start, slot), tokens)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_segments_and_ranks(data: st.DataObject) -> None:
    rank = st.sampled_from([0, 1, 3, 8, 9, 16, 33])
    small = make_bank([[data.draw(rank) for _ in OUTS] for _ in range(3)])
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    start = [before]
    for length in lengths:
        start.append(start[-1] + length)
    slot = [data.draw(st.integers(0, 2)) for _ in lengths]
    check(small, Segments.build(start, slot), start[-1] + after, layer=data.draw(st.integers(0, LAYERS - 1)))


def test_bf16_output_is_rounded_once() -> None:
    bank = make_bank([[16, 8, 4]], torch.bfloat16)
    x, y = torch.randn(6, IN).bfloat16(), torch.randn(6, sum(OUTS)).bfloat16()
    oracle = (y.float() + x.float() @ bank.merged(0, 0).t()).bfloat16()
    lora_add(y, x, Segments.build([0, 6], [0]), bank.weights, 0, SLICES)
    assert y.dtype == torch.bfloat16
    # the same sums in another order: at most the last bit, and rarely that
    assert_close(y, oracle, rtol=2**-7, atol=1e-3)
    assert float((y == oracle).float().mean()) > 0.98


def test_float32_arena_under_a_bf16_model() -> None:
    bank = make_bank([[16, 8, 4]], torch.float32)
    x, y = torch.randn(3, IN).bfloat16(), torch.zeros(3, sum(OUTS)).bfloat16()
    lora_add(y, x, Segments.build([0, 3], [0]), bank.weights, 0, SLICES)
    assert_close(y.float(), x.float() @ bank.merged(0, 0).t(), rtol=2**-7, atol=1e-3)


def test_a_row_scale_makes_a_dora() -> None:
    """Against the definition: W + scale B A with its rows brought to the lengths m, for one of two modules, and a bias
    that stays as it is."""
    bank = make_bank([[8, 3, 0]])
    base, bias, m = torch.randn(sum(OUTS), IN), torch.randn(sum(OUTS)), torch.rand(OUTS[0]) + 0.5
    updated = base + bank.merged(0, 1)
    excess = m / updated[: OUTS[0]].norm(dim=1) - 1
    arena = torch.cat([bank.weights.arena, excess, -excess * bias[: OUTS[0]]])
    weights = replace(bank.weights, arena=arena)
    weights.row_scale[0, 1, 0] = len(bank.weights.arena)
    updated[: OUTS[0]] *= (m / updated[: OUTS[0]].norm(dim=1))[:, None]
    x = torch.randn(7, IN)
    y = x @ base.t() + bias
    oracle = torch.cat([y[:2], x[2:] @ updated.t() + bias])
    lora_add(y, x, Segments.build([2, 7], [0]), weights, 1, SLICES)
    assert_close(y, oracle, rtol=1e-4, atol=1e-3)


def test_a_row_scale_near_one_survives_16_bits() -> None:
    """g itself would be rounded to 1 in bfloat16."""
    bank = make_bank([[1, 1, 1]], torch.bfloat16)
    stored = torch.cat([torch.full((OUTS[0],), 1e-3), torch.zeros(OUTS[0])]).bfloat16()
    weights = replace(bank.weights, arena=torch.cat([bank.weights.arena, stored]))
    x, y = torch.zeros(1, IN), torch.ones(1, sum(OUTS))
    weights.row_scale[0, 0, 0] = len(bank.weights.arena)
    lora_add(y, x, Segments.build([0, 1], [0]), weights, 0, SLICES[:1])
    assert_close(y[:, : OUTS[0]], torch.full((1, OUTS[0]), 1.001), rtol=1e-5, atol=0.0)


def test_only_the_given_slices_and_segments_are_written(bank: Bank) -> None:
    x, y = torch.randn(6, IN), torch.randn(6, sum(OUTS))
    before = y.clone()
    lora_add(y, x, Segments.build([1, 4], [3]), bank.weights, 0, SLICES[1:2])
    middle = slice(SLICES[1].out_offset, SLICES[1].out_offset + OUTS[1])
    assert not torch.equal(y[1:4, middle], before[1:4, middle])
    y[1:4, middle] = before[1:4, middle]
    assert torch.equal(y, before)


def test_faults(bank: Bank) -> None:
    segments = Segments.build([0, 1], [0])
    with pytest.raises(ValueError, match="does not fit"):
        lora_add(torch.zeros(1, 8), torch.zeros(1, IN), segments, bank.weights, 0, SLICES)
    with pytest.raises(ValueError, match="does not fit"):
        lora_add(torch.zeros(1, sum(OUTS)), torch.zeros(1, IN + 1), segments, bank.weights, 0, SLICES)
    tables = torch.zeros(2, 1, 3, dtype=torch.int32)
    pages = torch.zeros(2, 1, 3, 1, dtype=torch.int64)
    offsets = torch.full((2, 1, 3), -1)
    with pytest.raises(ValueError, match=r"^scale"):
        LoraWeights(torch.zeros(8), tables, torch.zeros(2, 1, 2), offsets, pages, pages)
    with pytest.raises(ValueError, match="row_scale"):
        LoraWeights(torch.zeros(8), tables, torch.zeros(2, 1, 3), offsets[:1], pages, pages)
    with pytest.raises(ValueError, match="a_page, b_page"):
        LoraWeights(torch.zeros(8), tables, torch.zeros(2, 1, 3), offsets, pages, pages[:1])
