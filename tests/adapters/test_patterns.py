import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftserve.adapters.formats.lora_targets import module_names
from peftserve.adapters.formats.patterns import MAX_REGEX_KEYS, compile_fullmatch, first_matches
from tests.adapters.files import SPEC

NAMES = list(module_names(SPEC))


def peft_choice(keys: list[str], name: str) -> str | None:
    """`peft.utils.other.get_pattern_key`, which returns the name itself when no key matches."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["^model.layers.0.self_attn.q_proj", "q_proj"],
        ["q_proj", "^model.layers.0.self_attn.q_proj"],
        ["layers.1.self_attn.q_proj", "mlp.up_proj", "model.layers.2.mlp.down_proj"],
        [r"layers\.1\.self_attn\.q_proj"],
        [r".*\.(q|k)_proj", "v_proj"],
        [r"model\.layers\.[01]\..*", "o_proj"],
        ["down_proj|up_proj", "gate_proj"],
        [r"self_attn\.[a-z]_proj$"],
    ],
)
def test_chooses_the_key_that_peft_chooses(keys: list[str]) -> None:
    chosen, faults = first_matches(keys, NAMES)
    expected = {name: key for name in NAMES if (key := peft_choice(keys, name)) is not None}
    assert chosen == expected
    assert faults == []


_parts = st.sampled_from(
    ["model", "layers", "0", "1", "2", "self_attn", "mlp", "q_proj", "up_proj", ".", r"\.", "^", "$", ".*", "[0-9]+",
     "|", "(q|k)_proj", r"\d", "_proj", "q", "?"]
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.lists(_parts, min_size=1, max_size=8).map("".join), min_size=1, max_size=3, unique=True))
def test_accepted_keys_mean_what_they_mean_to_peft(keys: list[str]) -> None:
    chosen, faults = first_matches(keys, NAMES)
    if faults:
        return
    assert chosen == {name: key for name in NAMES if (key := peft_choice(keys, name)) is not None}


def test_a_key_for_another_base_is_a_fault() -> None:
    chosen, faults = first_matches(["model.layers.77.self_attn.q_proj", "q.proj", "wq|wk"], NAMES)
    assert chosen == {}
    assert faults == [
        "key 'model.layers.77.self_attn.q_proj' matches no module of the base",
        "key 'q.proj' matches no module of the base",
        "key 'wq|wk' matches no module of the base",
    ]


@pytest.mark.parametrize("pattern", ["(?!.*vision).*q_proj", "(?<=layers).*", r"(a)\1", "[", "a{,3}", "[[:alpha:]]+"])
def test_refuses_what_it_cannot_evaluate_like_python(pattern: str) -> None:
    with pytest.raises(ValueError):
        compile_fullmatch(pattern)
    assert "key" in first_matches([pattern], NAMES)[1][0]


@pytest.mark.parametrize("pattern", [".*^?", "$*", r"\Qq_proj\E", r"\pL+", "(?U)q_proj"])
def test_refuses_what_only_re2_reads(pattern: str) -> None:
    with pytest.raises(ValueError, match="not a regular expression of Python's"):
        compile_fullmatch(pattern)


def test_ranges_beyond_latin_1() -> None:
    matches = compile_fullmatch("(?i)[!-\uffff]+_PROJ[\u0100-\u0200\uff00-\uffff]?")
    accepted = [text for text in ("\u1234_proj", "q_proj\u0180", "q_proj\u0250", "_proj") if matches(text)]
    assert accepted == ["\u1234_proj", "q_proj\u0180"]


def test_refuses_too_much() -> None:
    with pytest.raises(ValueError, match="2001 characters"):
        compile_fullmatch("a" * 2001)
    keys = [f"x{i}.*" for i in range(MAX_REGEX_KEYS + 1)]
    assert "more than 64 regular expressions" in first_matches(keys, NAMES)[1][-1]


def test_catastrophic_patterns_cost_nothing() -> None:
    """Python's re would take longer than the age of the universe for these."""
    started = time.perf_counter()
    for pattern in ("(x+x+)+y", "(.*)*(.*)*(.*)*(.*)*!", "((a|.)*)*#"):
        matches = compile_fullmatch(pattern)
        assert not any(matches(name) for name in NAMES)
    assert time.perf_counter() - started < 5
