from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peftserve_kernels import (
    RANK_PAGE_ROWS,
    Activation,
    BottleneckInput,
    BottleneckSite,
    BottleneckWeights,
    Segments,
    bottleneck_add,
    rank_pages,
)
from tests.kernels.rank_page_writer import write_rank_rows

SIZE, LAYERS, MAX_WIDTH = 20, 2, 64

MODULES = {
    Activation.RELU: nn.ReLU(),
    Activation.SILU: nn.SiLU(),
    Activation.GELU: nn.GELU(),
    Activation.TANH: nn.Tanh(),
}


@dataclass
class Bank:
    """Bottleneck adapters as the server holds them, and as plain modules by (slot, layer, site)."""

    weights: BottleneckWeights
    modules: dict[tuple[int, int, int], nn.Sequential] = field(default_factory=dict)
    scales: dict[tuple[int, int, int], float] = field(default_factory=dict)
    modes: list[BottleneckInput] = field(default_factory=list)

    @torch.no_grad()
    def delta(self, slot: int, layer: int, site: int, hidden: Tensor, residual: Tensor) -> Tensor:
        module = self.modules.get((slot, layer, site))
        if module is None:
            return torch.zeros_like(residual)
        match self.modes[slot]:
            case BottleneckInput.HIDDEN:
                z = hidden.float()
            case BottleneckInput.HIDDEN_PLUS_RESIDUAL:
                z = hidden.float() + residual
            case BottleneckInput.RESIDUAL:
                z = residual
        delta: Tensor = module(z)
        return self.scales[slot, layer, site] * delta


@dataclass
class Adapter:
    activation: Activation
    mode: BottleneckInput
    widths: tuple[int, int]  # by site


@torch.no_grad()
def make_bank(adapters: list[Adapter], dtype: torch.dtype = torch.float32) -> Bank:
    """Pages and biases are handed out in random order from one arena, between them NaN."""
    chunk = RANK_PAGE_ROWS * SIZE
    total = sum(2 * rank_pages(w) + 2 * bool(w) + rank_pages(w) for a in adapters for w in a.widths) * LAYERS + 3
    weights = BottleneckWeights.empty(
        elements=total * chunk, slots=len(adapters), layers=LAYERS, pages=rank_pages(MAX_WIDTH), dtype=dtype
    )
    weights.arena.fill_(torch.nan)
    free = (torch.randperm(total) * chunk).tolist()
    bank = Bank(weights, modes=[adapter.mode for adapter in adapters])
    for slot, adapter in enumerate(adapters):
        weights.activation[slot] = adapter.activation
        weights.input_mode[slot] = adapter.mode
        for layer in range(LAYERS):
            for site, width in enumerate(adapter.widths):
                if width == 0:
                    continue
                at = (slot, layer, site)
                down, up = nn.Linear(SIZE, width), nn.Linear(width, SIZE)
                for parameter in (*down.parameters(), *up.parameters()):
                    parameter.copy_(parameter.to(dtype))
                for table, rows in ((weights.down_page, down.weight), (weights.up_page, up.weight.t())):
                    pages = [free.pop() for _ in range(rank_pages(width))]
                    table[at][: len(pages)] = torch.tensor(pages)
                    write_rank_rows(weights.arena, pages, rows)
                for offsets, bias in ((weights.down_bias, down.bias), (weights.up_bias, up.bias)):
                    offset = free.pop()
                    offsets[at] = offset
                    weights.arena[offset : offset + len(bias)] = bias
                weights.width[at] = width
                weights.scale[at] = bank.scales[at] = 0.25 + slot
                bank.modules[at] = nn.Sequential(down, MODULES[adapter.activation], up)
    return bank


def check(bank: Bank, segments: Segments, tokens: int, site: BottleneckSite, hidden_dtype: torch.dtype) -> None:
    residual = torch.randn(tokens, SIZE)
    hidden = torch.randn(tokens, SIZE).to(hidden_dtype)
    stream = residual + hidden.float()
    oracle = stream.clone()
    for start, end, slot in segments.bounds:
        oracle[start:end] += bank.delta(slot, 1, site, hidden[start:end], residual[start:end])
    bottleneck_add(stream, hidden, residual, segments, bank.weights, 1, site)
    assert_close(stream, oracle, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return make_bank(
        [
            Adapter(Activation.SILU, BottleneckInput.HIDDEN, (16, 9)),
            Adapter(Activation.RELU, BottleneckInput.HIDDEN_PLUS_RESIDUAL, (0, 8)),
            Adapter(Activation.GELU, BottleneckInput.RESIDUAL, (1, 64)),
            Adapter(Activation.TANH, BottleneckInput.HIDDEN, (0, 0)),
        ]
    )


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", BottleneckSite)
@pytest.mark.parametrize(
    ("start", "slot", "tokens"),
    [
        pytest.param([0], [], 0, id="nothing"),
        pytest.param([0], [], 4, id="base only"),
        pytest.param([0, 1], [2], 1, id="one token"),
        pytest.param([2, 6], [1], 9, id="base tokens on both sides"),
        pytest.param([0, 1, 2, 3, 4], [0, 1, 2, 3], 4, id="distinct"),
        pytest.param([0, 3, 5], [0, 0], 5, id="identical"),
        pytest.param([0, 1, 2, 40], [1, 2, 0], 41, id="skewed"),
        pytest.param([0, 0, 7, 7], [0, 1, 2], 7, id="empty segments"),
    ],
)
def test_equals_a_plain_module(
    bank: Bank, start: list[int], slot: list[int], tokens: int, site: BottleneckSite, hidden_dtype: torch.dtype
) -> None:
    check(bank, Segments.build(start, slot), tokens, site, hidden_dtype)


def test_bf16_arena_is_computed_in_float32() -> None:
    bank = make_bank([Adapter(Activation.SILU, BottleneckInput.HIDDEN_PLUS_RESIDUAL, (33, 33))], torch.bfloat16)
    check(bank, Segments.build([0, 5], [0]), 5, BottleneckSite.FFN, torch.bfloat16)


def test_inputs_are_not_changed(bank: Bank) -> None:
    stream, hidden, residual = torch.randn(3, 3, SIZE).unbind()
    before = hidden.clone(), residual.clone()
    bottleneck_add(stream, hidden, residual, Segments.build([0, 3], [1]), bank.weights, 0, BottleneckSite.FFN)
    assert torch.equal(hidden, before[0])
    assert torch.equal(residual, before[1])


def test_faults(bank: Bank) -> None:
    segments, x = Segments.build([0, 1], [0]), torch.zeros(1, SIZE)
    with pytest.raises(ValueError, match="stream: must be float32"):
        bottleneck_add(x.bfloat16(), x, x, segments, bank.weights, 0, 0)
    with pytest.raises(ValueError, match="one shape"):
        bottleneck_add(x, x, torch.zeros(2, SIZE), segments, bank.weights, 0, 0)
    with pytest.raises(ValueError, match="2 is not a valid BottleneckSite"):
        bottleneck_add(x, x, x, segments, bank.weights, 0, 2)
