from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftserve_kernels.cpu.sample import sample
from peftserve_kernels.sample import sample_reference
from tests.kernels.native import ISAS, isa, threads


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


@dataclass
class Draws:
    """Arguments of `sample`, one row each."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    def rows(self, picked: list[int]) -> tuple[Tensor, ...]:
        return tuple(x[picked] for x in vars(self).values())


def random_draws(rows: int, vocab: int, spread: float) -> Draws:
    """Every combination of parameters that requests use, over logits with a few likely tokens."""

    def choice(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,))]

    logits = torch.randn(rows, vocab) * spread
    logits[torch.arange(rows)[:, None], torch.randint(vocab, (rows, 3))] += 4 * spread
    return Draws(
        logits,
        choice(0.0, 0.2, 0.7, 1.0, 1.5, 4.0),
        choice(0, 0, 1, 5, 50, 1000, 10**6).int(),
        choice(1.0, 1.0, 0.99, 0.9, 0.5, 1e-6),
        choice(0.0, 0.0, 0.01, 0.3, 1.0),
        torch.rand(rows, dtype=torch.float64),
    )


def interval(draws: Draws, row: int, token: int) -> tuple[float, float]:
    """Where on the kept tokens' running sum, in float64, the token lies."""
    logits = draws.logits[row].double()
    order = logits.sort(descending=True, stable=True).indices
    p = torch.softmax((logits - logits.max()) / float(draws.temperature[row]), -1)[order]
    if draws.top_k[row]:
        p = p[: int(draws.top_k[row])]
        p = p / p.sum()
    if draws.top_p[row] < 1.0:
        p = p[: int((p.cumsum(0) < float(draws.top_p[row])).sum()) + 1]
    p = p[p >= float(draws.min_p[row]) * p[0]]
    end = (p / p.sum()).cumsum(0)
    index = order.tolist().index(token)
    assert index <= len(p), "not a token that the filters keep"  # one more where two probabilities differ by a rounding
    index = min(index, len(p) - 1)
    return (float(end[index - 1]) if index else 0.0), float(end[index])


@pytest.mark.parametrize("vocab", [1, 15, 255, 257, 6000, 49152])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_against_the_reference(vocab: int, spread: float) -> None:
    draws = random_draws(60 if vocab < 10_000 else 25, vocab, spread)
    everything = list(range(len(draws.uniform)))
    wanted = sample_reference(*draws.rows(everything)).tolist()
    for row, (pick, expected) in enumerate(zip(sample(*draws.rows(everything)).tolist(), wanted, strict=True)):
        if pick == expected:
            continue
        # another order of the sums moves a border between two tokens a little; the number must lie on it
        lower, upper = interval(draws, row, pick)
        assert lower - 1e-5 <= float(draws.uniform[row]) <= upper + 1e-5


def test_greedy_is_the_lowest_id_among_the_largest() -> None:
    logits = torch.zeros(4, 1000)
    logits[1, [999, 500, 256]] = 1.0
    logits[2] = -torch.inf
    logits[3, 999] = 2.0
    ones, zeros = torch.ones(4), torch.zeros(4)
    assert sample(logits, zeros, zeros.int(), ones, zeros, zeros.double()).tolist() == [0, 256, -1, 999]


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1.0, 1e4])
def test_the_order_is_by_logit_and_then_by_id(spread: float, temperature: float) -> None:
    """A row drawn at many numbers: tokens come in the order of a stable sort, each with its share."""
    numbers = 400
    row = (torch.randn(300) * spread).round(decimals=6 if spread < 1 else 1)
    logits = row.expand(numbers, 300)
    uniform = (torch.arange(numbers, dtype=torch.float64) + 0.5) / numbers
    temperatures = torch.full((numbers,), temperature)
    off = torch.zeros(numbers)
    picks = sample(logits, temperatures, off.int(), off + 1, off, uniform)
    order = row.sort(descending=True, stable=True).indices
    rank = torch.empty(300, dtype=torch.int64)
    rank[order] = torch.arange(300)
    assert (rank[picks].diff() >= 0).all()
    p = torch.softmax((row.double() - row.max()) / temperatures[0].double(), -1)
    share = torch.bincount(picks, minlength=300) / numbers
    assert (share - p).abs().max() <= 1.01 / numbers


@settings(max_examples=25, deadline=None)
@given(vocab=st.sampled_from([1, 17, 300, 5000]), rows=st.integers(1, 20), data=st.data())
def test_a_row_gives_the_same_token_in_every_batch(vocab: int, rows: int, data: st.DataObject) -> None:
    draws = random_draws(rows, vocab, 2.0)
    whole = sample(*draws.rows(list(range(rows))))
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    with threads(data.draw(st.integers(1, 3))):
        assert sample(*draws.rows(picked)).tolist() == whole[picked].tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("entries", [1, 2000])
def test_a_broken_row_has_no_pick_and_disturbs_no_other(bad: float, entries: int) -> None:
    draws = random_draws(30, 2000, 2.0)
    clean = sample(*draws.rows(list(range(30))))
    draws.logits[::3, :entries] = bad
    picks = sample(*draws.rows(list(range(30))))
    assert (picks[::3].clamp(-1, 0) == (0 if bad == -torch.inf and entries == 1 else -1)).all()
    rest = [i for i in range(30) if i % 3]
    assert picks[rest].tolist() == clean[rest].tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_logit_counts_wherever_it_is(bad: float) -> None:
    logits = torch.full((300, 300), -3.4e38)  # the lowest that is finite, nearly
    off = torch.zeros(300)
    assert not sample(logits, off, off.int(), off + 1, off, off.double()).any()
    logits.fill_diagonal_(bad)
    for temperature in (off, off + 1):
        assert (sample(logits, temperature, off.int(), off + 1, off, off.double()) == -1).all()


def test_banned_tokens_are_never_picked() -> None:
    draws = random_draws(40, 3000, 0.5)
    draws.logits[:, ::2] = -torch.inf
    picks = sample(*draws.rows(list(range(40))))
    assert (picks % 2 == 1).all()
