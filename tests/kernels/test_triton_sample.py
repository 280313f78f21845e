import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftserve_kernels.gpu.launch import TARGETS, Target, recording
from peftserve_kernels.gpu.sample import choose, sample
from peftserve_kernels.sample import sample_reference
from tests.kernels.test_native_sample import Draws, interval, random_draws


def picks(draws: Draws) -> list[int]:
    return sample(*vars(draws).values()).tolist()


def check(draws: Draws) -> None:
    """The reference's tokens. Another order of the sums moves a border between two tokens a little: where the picks
    differ, the number must lie on the border of both."""
    everything = list(range(len(draws.uniform)))
    wanted = sample_reference(*draws.rows(everything)).tolist()
    for row, (pick, expected) in enumerate(zip(picks(draws), wanted, strict=True)):
        if pick != expected:
            lower, upper = interval(draws, row, pick)
            assert lower - 2e-6 <= float(draws.uniform[row]) <= upper + 2e-6, f"row {row}: {pick}, {expected}"


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(("vocab", "rows"), [(1, 2), (33, 6), (2049, 4), (6000, 3)])
def test_against_the_reference(vocab: int, rows: int, spread: float) -> None:
    check(random_draws(rows, vocab, spread))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [15, 257, 6000, 49152])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
def test_many_rows_against_the_reference(seed: int, vocab: int, spread: float) -> None:
    torch.manual_seed(seed)
    check(random_draws(30 if vocab < 10_000 else 4, vocab, spread))


def test_a_level_of_more_tokens_than_are_copied_out() -> None:
    """A flat row: the search goes over the whole row, not over a copy."""
    draws = random_draws(2, 10_000, 0.01)
    assert choose(10_000).copied < 10_000
    draws.temperature[:] = 1.0
    draws.top_k[:] = torch.tensor([7000, 0])
    draws.top_p[:] = torch.tensor([0.9, 0.95])
    draws.min_p[:] = 0.0
    check(draws)


def test_equal_logits_are_ordered_by_id() -> None:
    """Also across chunks, and where a filter cuts through equals."""
    vocab = 2100
    logits = torch.zeros(4, vocab)
    logits[:, 7::2] = -0.0
    # quarters are exact: the running sum must exceed the number, not only reach it
    uniform = torch.tensor([(vocab // 2 + 0.5) / vocab, 0.74, 0.75, 0.99], dtype=torch.float64)
    top_k = torch.tensor([0, 4, 4, 4], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.5])
    got = sample(logits, torch.ones(4), top_k, top_p, torch.zeros(4), uniform)
    assert got.tolist() == [vocab // 2, 2, 3, 1]


def test_greedy_is_the_lowest_id_among_the_largest() -> None:
    logits = torch.zeros(5, 5000)
    logits[1, [4999, 2500, 2048]] = 1.0
    logits[2] = -torch.inf
    logits[3, 4999] = 2.0
    logits[4, 100:] = torch.inf
    zeros = torch.zeros(5)
    got = sample(logits, zeros, zeros.int(), zeros + 1, zeros, zeros.double())
    assert got.tolist() == [0, 2048, -1, 4999, -1]


@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e4])
def test_a_row_drawn_at_many_numbers_gives_each_token_its_share(temperature: float) -> None:
    numbers, vocab = 6, 300
    row = torch.randn(vocab).round(decimals=1)
    off = torch.zeros(numbers)
    uniform = (torch.arange(numbers, dtype=torch.float64) + 0.5) / numbers
    got = sample(row.expand(numbers, vocab), off + temperature, off.int(), off + 1, off, uniform)
    order = row.sort(descending=True, stable=True).indices
    cumulative = torch.softmax((row.double() - row.max()) / temperature, -1)[order].cumsum(0)
    wanted = order[torch.searchsorted(cumulative, uniform, right=True)]
    assert got.tolist() == wanted.tolist()


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 4), vocab=st.sampled_from([1, 40, 300]), data=st.data())
def test_a_row_gives_the_same_token_in_every_batch(rows: int, vocab: int, data: st.DataObject) -> None:
    draws = random_draws(rows, vocab, 2.0)
    whole = sample(*vars(draws).values())
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
    assert sample(*draws.rows(picked)).tolist() == whole[picked].tolist()


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    vocab=st.integers(1, 100),
    temperature=st.sampled_from([0.0, 1e-40, 1e-30, 0.5, 100.0]),
    top_k=st.sampled_from([-1, 0, 1, 50, 10**6]),
    top_p=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 1.0, 2.0]),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
)
def test_always_a_token_that_may_be_picked(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator).mul(30).round()
    logits[0, torch.randperm(vocab, generator=generator)[: vocab // 2]] = -torch.inf
    got = sample(
        logits,
        torch.tensor([temperature]),
        torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p]),
        torch.tensor([min_p]),
        torch.tensor([uniform], dtype=torch.float64),
    )
    pick = int(got)
    assert logits[0, pick] > -torch.inf
    assert int((logits > logits[0, pick]).sum()) < (top_k if top_k > 0 else vocab)


@pytest.mark.parametrize(("bad", "entries"), [(torch.nan, 1), (torch.nan, 300), (torch.inf, 3), (-torch.inf, 300)])
def test_a_broken_row_has_no_pick_and_disturbs_no_other(bad: float, entries: int) -> None:
    draws = random_draws(2, 300, 2.0)
    draws.temperature[:] = 1.0
    clean = picks(draws)
    draws.logits[0, :entries] = bad
    broken, other = picks(draws)
    assert broken == -1
    assert other == clean[1]


def test_a_view_of_wider_logits_and_float32_numbers() -> None:
    draws = random_draws(2, 70, 2.0)
    wide = torch.full((2, 100), 99.0)
    wide[:, :70] = draws.logits
    narrow = sample(wide[:, :70], *list(vars(draws).values())[1:-1], draws.uniform.float())
    assert narrow.tolist() == picks(draws)
    assert sample(wide.t().contiguous().t()[:, :70], *list(vars(draws).values())[1:]).tolist() == picks(draws)


def test_no_rows() -> None:
    draws = random_draws(3, 40, 1.0)
    assert sample(*draws.rows([])).shape == (0,)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("vocab", [1, 100, 49152, 128256])
def test_launches(target: Target, vocab: int) -> None:
    rows = 3
    with recording(target) as launches:
        floats = torch.empty(rows, device="meta")
        sample(torch.empty(rows, vocab, device="meta"), floats, floats.int(), floats, floats, floats.double())
    config = choose(vocab)
    assert [launch.name for launch in launches] == ["_chunk_maxima", "_chunk_tallies", "_copy_out", "_pick"]
    chunks = -(-vocab // config.chunk)
    assert [launch.grid for launch in launches] == [(rows, chunks)] * 3 + [(rows,)]
    assert config.chunk & (config.chunk - 1) == 0
    assert config.chunk % (32 * config.row_warps) == 0
