import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from peftserve_kernels import sample


def run(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    uniform: float | Tensor = 0.5,
) -> Tensor:
    """`sample` with the same parameters for every row."""
    rows = len(logits)
    picks = uniform if isinstance(uniform, Tensor) else torch.full((rows,), uniform, dtype=torch.float64)
    return sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        picks,
    )


def filtered_by_transformers(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The probabilities that transformers samples from, float64 [B, V]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    return torch.softmax(warpers(ids, logits.double()), dim=-1)  # type: ignore[arg-type]


def inverse_cdf(probabilities: Tensor, uniform: float) -> int:
    order = sorted(range(len(probabilities)), key=lambda i: (-float(probabilities[i]), i))
    total = 0.0
    for token in order:
        total += float(probabilities[token])
        if total > uniform:
            return token
    raise AssertionError("uniform must be below the sum")


FILTERS = [
    pytest.param(0, 1.0, 0.0, id="none"),
    pytest.param(1, 1.0, 0.0, id="top_k=1"),
    pytest.param(7, 1.0, 0.0, id="top_k"),
    pytest.param(0, 0.6, 0.0, id="top_p"),
    pytest.param(0, 0.01, 0.0, id="top_p keeps one"),
    pytest.param(0, 1.0, 0.2, id="min_p"),
    pytest.param(0, 1.0, 1.0, id="min_p keeps one"),
    pytest.param(20, 0.7, 0.05, id="all"),
    pytest.param(1000, 0.95, 0.0, id="top_k beyond the vocabulary"),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_against_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(6, 50) * 2
    probabilities = filtered_by_transformers(logits, temperature, min(top_k, 50), top_p, min_p)
    for uniform in (0.0, 0.031, 0.31, 0.5, 0.77, 0.99):
        picks = run(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
        assert picks.dtype == torch.int64
        assert picks.tolist() == [inverse_cdf(row, uniform) for row in probabilities]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [*FILTERS, pytest.param(5000, 0.999, 0.0, id="large top_k")])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_a_vocabulary_wider_than_the_first_look(spread: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(3, 6000) * spread
    probabilities = filtered_by_transformers(logits, 1.0, top_k, top_p, min_p)
    for uniform in (0.02, 0.5, 0.9, 0.9995):
        picks = run(logits, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform).tolist()
        for pick, row in zip(picks, probabilities, strict=True):
            # float32 and float64 probabilities round the border between two neighbours differently
            lower = float(row[row > row[pick]].sum())
            assert row[pick] > 0
            assert lower - 1e-5 <= uniform <= lower + float(row[pick]) + 1e-5


def test_temperature_zero_is_argmax_with_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [-torch.inf, -5.0, -6.0], [2.0, 2.0, 2.0]])
    assert run(logits, temperature=0.0, top_k=2, top_p=0.1, uniform=0.99).tolist() == [1, 1, 0]


@pytest.mark.parametrize("vocab", [8, 300, 5000])
def test_equal_logits_are_ordered_by_id(vocab: int) -> None:
    """All logits equal: the pick is floor(uniform * kept), also where topk may take any of the equals."""
    logits = torch.zeros(1, vocab)
    assert run(logits, uniform=(vocab // 2 + 0.5) / vocab).item() == vocab // 2
    # quarters are exact: the running sum must exceed the number, not only reach it
    assert [run(logits, top_k=4, uniform=u).item() for u in (0.0, 0.25, 0.5, 0.74, 0.75)] == [0, 1, 2, 2, 3]
    assert run(logits, top_k=4, top_p=0.5, uniform=0.99).item() == 1


def test_greedy_and_sampled_rows_in_one_batch() -> None:
    logits = torch.randn(4, 40)
    uniform = torch.tensor([0.9, 0.9, 0.2, 0.2], dtype=torch.float64)
    parameters = (
        torch.tensor([0.0, 1.0, 0.0, 0.7]),
        torch.tensor([0, 5, 0, 0], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.5, 0.9]),
        torch.tensor([0.0, 0.0, 0.0, 0.1]),
        uniform,
    )
    together = sample(logits, *parameters)
    assert together[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    alone = [int(sample(logits[i : i + 1], *(p[i : i + 1] for p in parameters))) for i in range(4)]
    assert together.tolist() == alone


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    vocab=st.integers(1, 600),
    temperature=st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 50, 599, 10**6]),
    top_p=st.sampled_from([1e-6, 0.5, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-24, 1 - 2**-53]),
    banned=st.booleans(),
)
def test_always_a_token_that_may_be_picked(
    seed: int,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    banned: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator).mul(30).round()
    if banned and vocab > 1:
        logits[0, torch.randperm(vocab, generator=generator)[: vocab - 1]] = -torch.inf
    pick = int(run(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform))
    assert logits[0, pick] > -torch.inf
    assert int((logits > logits[0, pick]).sum()) < (top_k or vocab)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    draws = 20_000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    picks = run(logits.expand(draws, 4), uniform=uniform)
    frequency = torch.bincount(picks, minlength=4) / draws
    assert torch.allclose(frequency, torch.softmax(logits[0], -1), atol=2 / draws)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("entries", [1, 500])
def test_a_broken_row_has_no_pick_and_disturbs_no_other(bad: float, entries: int) -> None:
    logits = torch.randn(3, 500)
    alone = run(logits[[0, 2]], top_p=0.9, uniform=0.7)
    logits[1, :entries] = bad
    for temperature in (0.0, 1.0):
        pick = int(run(logits, temperature=temperature)[1])
        assert 1 <= pick < 500 if bad == -torch.inf and entries == 1 else pick == -1
    assert run(logits, top_p=0.9, uniform=0.7)[[0, 2]].tolist() == alone.tolist()


def test_no_rows() -> None:
    assert run(torch.zeros(0, 9)).shape == (0,)


def test_faults() -> None:
    with pytest.raises(ValueError, match="logits: must be float32"):
        run(torch.zeros(2, 4).bfloat16())
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"top_p: must be \[2\], got \[1\]"):
        sample(torch.zeros(2, 4), ones, ones.int(), ones[:1], ones, ones / 2)
