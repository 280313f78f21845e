import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftserve_kernels import Penalties, RowPenalties
from peftserve_kernels.gpu.launch import TARGETS, Target, recording
from peftserve_kernels.gpu.penalties import apply_penalties
from peftserve_kernels.penalties import apply_penalties_reference

VOCAB = 300
ROWS = st.builds(
    RowPenalties,
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    presence=st.sampled_from([0.0, -0.5, 1.5]),
    frequency=st.sampled_from([0.0, 0.3, -2.0]),
    output_counts=st.dictionaries(st.integers(0, VOCAB - 1), st.integers(0, 9), max_size=60),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=20),
    banned=st.frozensets(st.integers(0, VOCAB - 1), max_size=20),
)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(ROWS, max_size=5))
def test_against_the_reference(rows: list[RowPenalties]) -> None:
    penalties = Penalties.build(rows)
    logits = torch.randn(len(rows), VOCAB)
    wanted = logits.clone()
    apply_penalties_reference(wanted, penalties)
    apply_penalties(logits, penalties)
    torch.testing.assert_close(logits, wanted)


def test_more_pairs_than_a_program_takes_and_a_strided_view() -> None:
    rows = [RowPenalties(repetition=1.2, presence=0.1, output_counts={i: i % 3 for i in range(VOCAB)})] * 2
    penalties = Penalties.build(rows)
    logits = torch.randn(VOCAB, 2).t()
    wanted = logits.clone()
    apply_penalties_reference(wanted, penalties)
    apply_penalties(logits, penalties)
    torch.testing.assert_close(logits, wanted)


def test_untouched_logits_keep_their_bits() -> None:
    logits = torch.randn(3, VOCAB)
    before = logits.clone()
    apply_penalties(logits, Penalties.build([RowPenalties(), RowPenalties(bias={5: 1.0}), RowPenalties()]))
    changed = (logits != before).nonzero().tolist()
    assert changed == [[1, 5]]


@pytest.mark.parametrize("target", TARGETS)
def test_launches_only_what_there_is(target: Target) -> None:
    nothing = Penalties.build([RowPenalties()], device="meta")
    seen = Penalties.build([RowPenalties(presence=1.0, output_counts=dict.fromkeys(range(130), 1))], device="meta")
    banned = Penalties.build([RowPenalties(banned=frozenset((1, 2)))], device="meta")
    logits = torch.empty(1, VOCAB, device="meta")
    with recording(target) as launches:
        for penalties in (nothing, seen, banned):
            apply_penalties(logits, penalties)
    assert [(launch.name, launch.grid) for launch in launches] == [("_seen_tokens", (2,)), ("_biased_tokens", (1,))]
