"""The sampler: which rows it changes, what it reports, and that a seed means the same tokens everywhere."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from peftserve.engine.plan import SampleSpec, count_tokens
from peftserve.engine.sampler import Sampler, uniforms
from peftserve.types import SamplingParams

VOCAB = 64

sample_rows = Sampler().sample_rows  # one for all tests, as for all steps


def spec(
    *,
    seed: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Sequence[int] = (),
    **params: object,
) -> SampleSpec:
    sampling = SamplingParams(max_tokens=10, **params)  # type: ignore[arg-type]
    counts = count_tokens(prompt, output) if sampling.counts_tokens else None
    return SampleSpec(sampling, seed, len(output), counts, frozenset(banned))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def pick(row: torch.Tensor, what: SampleSpec) -> int:
    return sample_rows(row.clone()[None], [what])[0].token_id


def splitmix64(state: int) -> int:
    """The published algorithm in plain integers: the next output after `state`."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniforms_are_pinned() -> None:
    """What a seed means must never change: streams are SplitMix64 seeded by SplitMix64."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    seeds, positions = [0, 0, 1, 2**64 - 1, -1, 2**70 + 3], [0, 1, 0, 7, 7, 100_000]
    expected = [
        (splitmix64((splitmix64(seed % 2**64) + position * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert uniforms(seeds, positions).tolist() == expected
    assert expected[0] == 0.6524484863740322


def test_uniforms_look_uniform_over_positions_and_over_seeds() -> None:
    for numbers in (uniforms([7] * 20_000, range(20_000)), uniforms(range(20_000), [3] * 20_000)):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
        # 99 degrees of freedom: the 1e-6 quantile of chi squared is 181.
        assert ((counts - 200) ** 2 / 200).sum() < 181
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    table = torch.zeros(2, VOCAB)
    table[0, 5] = table[0, 9] = 1.0
    assert [s.token_id for s in sample_rows(table, [spec(temperature=0.0), spec(temperature=0.0)])] == [5, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-38])
def test_tiny_temperatures_are_greedy_instead_of_overflowing(temperature: float) -> None:
    row = logits(1)[0] * 100
    assert pick(row, spec(temperature=temperature, seed=1)) == int(row.argmax())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    table = logits(4)
    mixed = [
        spec(seed=1, temperature=0.8, top_p=0.9),
        spec(temperature=0.0),
        spec(seed=2, temperature=1.3, top_k=5, logprobs=3),
        spec(seed=3, output=(1, 2, 2), presence_penalty=1.5, repetition_penalty=1.2, logit_bias={4: 3.0}),
    ]
    together = sample_rows(table.clone(), mixed)
    alone = [sample_rows(table[i : i + 1].clone(), [mixed[i]])[0] for i in range(4)]
    assert [s.token_id for s in together] == [s.token_id for s in alone]
    assert together[2].logprobs == alone[2].logprobs


def test_draws_follow_the_distribution() -> None:
    row = torch.full((VOCAB,), -torch.inf)
    row[:3] = torch.tensor([0.5, 0.3, 0.2]).log()
    output: list[int] = []
    for _ in range(3000):
        output.append(pick(row, spec(seed=11, output=output)))
    counts = Counter(output)
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        assert counts[token] / 3000 == pytest.approx(probability, abs=0.03)


def test_the_position_in_the_output_moves_the_draw_and_nothing_else_does() -> None:
    row = torch.zeros(VOCAB)
    first = [pick(row, spec(seed=5, output=[0] * n)) for n in range(20)]
    again = [pick(row, spec(seed=5, output=[1] * n, prompt=(3, 4))) for n in range(20)]
    assert first == again
    assert len(set(first)) > 10
    assert first != [pick(row, spec(seed=6, output=[0] * n)) for n in range(20)]


def test_penalties_bias_and_bans_change_the_pick() -> None:
    row = torch.zeros(VOCAB)
    row[7], row[8] = 3.0, 2.5
    greedy = {"temperature": 0.0}
    assert pick(row, spec(**greedy)) == 7
    assert pick(row, spec(**greedy, output=(7,), presence_penalty=1.0)) == 8
    assert pick(row, spec(**greedy, output=(7, 7), frequency_penalty=0.3)) == 8
    assert pick(row, spec(**greedy, prompt=(7,), presence_penalty=2.0, frequency_penalty=2.0)) == 7
    assert pick(row, spec(**greedy, prompt=(7,), repetition_penalty=1.5)) == 8
    assert pick(row, spec(**greedy, logit_bias={8: 1.0})) == 8
    assert pick(row, spec(**greedy, banned=(7,))) == 8
    assert pick(row, spec(**greedy, banned=(7,), logit_bias={7: 100.0})) == 8


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    row = logits(1)[0]
    what = spec(temperature=0.0, banned=(VOCAB, 10**9), logit_bias={VOCAB: 5.0, -1: 5.0})
    assert pick(row, what) == int(row.argmax())


def test_logprobs_are_of_the_models_own_distribution() -> None:
    table = logits(3)
    expected = table.log_softmax(dim=-1)
    specs = [
        spec(temperature=0.0, logprobs=0, logit_bias={3: 100.0}),
        spec(temperature=0.0),
        spec(seed=4, temperature=5.0, logprobs=4, output=(1,), frequency_penalty=2.0),
    ]
    first, second, third = sample_rows(table, specs)
    assert second.logprobs is None
    assert first.logprobs is not None
    assert (first.token_id, first.logprobs.token_id, first.logprobs.top) == (3, 3, [])
    assert first.logprobs.logprob == pytest.approx(float(expected[0, 3]), abs=1e-6)
    assert third.logprobs is not None
    assert third.logprobs.logprob == pytest.approx(float(expected[2, third.token_id]), abs=1e-6)
    best = expected[2].topk(4)
    assert [token for token, _ in third.logprobs.top] == best.indices.tolist()
    assert [value for _, value in third.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_more_logprobs_than_tokens() -> None:
    (got,) = sample_rows(logits(1), [spec(temperature=0.0, logprobs=VOCAB + 5)])
    assert got.logprobs is not None
    assert len(got.logprobs.top) == VOCAB


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_overflowed_harm_nobody(bad: float) -> None:
    table = logits(3)
    expected = int(table[0].argmax())
    table[1] = bad
    table[2, 5] = bad
    specs = [spec(temperature=0.0), spec(seed=1, logprobs=2), spec(seed=1, logprobs=2, repetition_penalty=2.0)]
    good, broken, partly = sample_rows(table, specs)
    assert (good.token_id, good.is_finite) == (expected, True)
    assert not broken.is_finite
    assert partly.is_finite == (bad == -float("inf"))  # which is a token of no probability


def test_rows_that_come_and_go_are_drawn_as_they_ask() -> None:
    """What a sampler keeps from step to step is of the rows that it was for."""
    greedy, hot, picky = spec(temperature=0.0), spec(temperature=5.0, seed=1), spec(temperature=5.0, top_k=1, seed=1)
    table = logits(3, seed=8)
    sampler = Sampler()
    for rows in ([greedy], [greedy], [hot], [picky], [hot, greedy, picky], [hot, greedy, picky], [greedy, hot, picky]):
        kept = sampler.sample_rows(table[: len(rows)].clone(), rows)
        assert kept == Sampler().sample_rows(table[: len(rows)].clone(), rows)
    later = [spec(temperature=5.0, seed=1, output=[7] * position) for position in range(20)]
    assert len({sampler.sample_rows(table[:1].clone(), [row])[0].token_id for row in later}) > 5
