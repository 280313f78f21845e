from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import RepetitionPenaltyLogitsProcessor

from peftserve_kernels import Penalties, RowPenalties, apply_penalties

VOCAB = 30
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def counts(prompt: list[int], output: list[int]) -> dict[int, int]:
    return {**dict.fromkeys(prompt, 0), **Counter(output)}


@settings(max_examples=50, deadline=None)
@given(prompt=TOKENS, output=TOKENS, penalty=st.floats(0.5, 2.0))
def test_repetition_is_that_of_transformers(prompt: list[int], output: list[int], penalty: float) -> None:
    logits = torch.randn(2, VOCAB)
    oracle = logits.clone()
    if prompt + output:
        oracle[1:] = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits[1:].clone())
    rows = [RowPenalties(), RowPenalties(repetition=penalty, output_counts=counts(prompt, output))]
    apply_penalties(logits, Penalties.build(rows))
    assert_close(logits, oracle)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.zeros(1, 5)
    row = RowPenalties(presence=0.5, frequency=0.25, output_counts=counts([0, 1], [1, 1, 3]))
    apply_penalties(logits, Penalties.build([row]))
    assert logits.tolist() == [[0.0, -1.0, 0.0, -0.75, 0.0]]


def test_repetition_comes_before_the_others_and_bias_last() -> None:
    logits = torch.tensor([[4.0, -4.0]])
    row = RowPenalties(repetition=2.0, presence=1.0, output_counts={0: 1, 1: 1}, bias={0: 10.0})
    apply_penalties(logits, Penalties.build([row]))
    assert logits.tolist() == [[11.0, -9.0]]


def test_bans_win_over_bias() -> None:
    logits = torch.zeros(2, 4)
    rows = [RowPenalties(bias={1: 100.0, 2: -3.0}, banned=frozenset({1, 3})), RowPenalties()]
    apply_penalties(logits, Penalties.build(rows))
    assert logits.tolist() == [[0.0, -torch.inf, -3.0, -torch.inf], [0.0] * 4]


def test_rows_without_penalties_have_no_pairs() -> None:
    penalties = Penalties.build([RowPenalties(output_counts={1: 3}), RowPenalties(presence=1.0, output_counts={2: 1})])
    assert penalties.seen_row.tolist() == [1]
    logits = torch.ones(2, 4)
    apply_penalties(logits, penalties)
    assert logits.tolist() == [[1.0] * 4, [1.0, 1.0, 0.0, 1.0]]


def test_no_rows() -> None:
    apply_penalties(torch.zeros(0, 4), Penalties.build([]))


def test_faults() -> None:
    penalties = Penalties.build([RowPenalties()])
    with pytest.raises(ValueError, match=r"logits: must be float32 \[1, V\]"):
        apply_penalties(torch.zeros(2, 4), penalties)
    with pytest.raises(ValueError, match="bfloat16"):
        apply_penalties(torch.zeros(1, 4).bfloat16(), penalties)
