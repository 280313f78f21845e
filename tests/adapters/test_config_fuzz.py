"""Any JSON in any config field: the adapter is parsed or refused with its faults; nothing else ever comes out."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from peftserve.adapters import manifest, safetensors
from peftserve.adapters.formats import bottleneck_config, parse
from peftserve.adapters.formats import lora as lora_format
from peftserve.adapters.formats import prefix as prefix_format
from peftserve.adapters.formats import prompt as prompt_format
from peftserve.errors import InvalidAdapterError
from tests.adapters.files import MAX_RANK, SPEC, bottleneck, lora, prefix, prompt

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(-(10**400), 10**400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["q_proj", "default", "learned", "layers", "all-linear", "(", ".*", "CAUSAL_LM", "0"]),
)
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def changes(*formats: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields, most of them real ones, with any values."""
    fields = sorted(set().union(*(f.HONOURED | f.HARMLESS | f.REFUSED.keys() for f in formats)) - {"peft_type"})
    return st.dictionaries(st.sampled_from(fields) | st.text(max_size=8), _values, max_size=4)


KINDS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "prefix": prefix(),
    "prompt": prompt(),
    "bottleneck": bottleneck(),
}
TENSORS = {kind: safetensors.read(save(arrays)) for kind, (_, arrays) in KINDS.items()}


def parsed_or_refused(kind: str, config: dict[str, Any]) -> None:
    text = json.dumps(config).encode()
    try:
        canonical = manifest.canonical_config(manifest.read_config(text))
        adapter = parse(manifest.read_config(canonical), TENSORS[kind], SPEC, MAX_RANK)
    except InvalidAdapterError as error:
        refused = error
    else:
        assert json.dumps(adapter.details(), allow_nan=False)
        return
    assert 1 <= len(refused.faults) <= 51
    assert all(len(fault) < 2000 for fault in refused.faults)
    assert len(refused.message) < 7000


@settings(max_examples=300, deadline=None)
@given(changes(lora_format), st.sampled_from(["lora", "dora"]))
def test_lora(change: dict[str, Any], kind: str) -> None:
    parsed_or_refused(kind, KINDS[kind][0] | change)


@settings(max_examples=150, deadline=None)
@given(changes(prefix_format))
def test_prefix(change: dict[str, Any]) -> None:
    parsed_or_refused("prefix", KINDS["prefix"][0] | change)


@settings(max_examples=150, deadline=None)
@given(changes(prompt_format))
def test_prompt(change: dict[str, Any]) -> None:
    parsed_or_refused("prompt", KINDS["prompt"][0] | change)


@settings(max_examples=300, deadline=None)
@given(changes(bottleneck_config), st.dictionaries(st.sampled_from(["name", "hidden_size", "version"]), _values))
def test_bottleneck(inner: dict[str, Any], outer: dict[str, Any]) -> None:
    config = KINDS["bottleneck"][0]
    parsed_or_refused("bottleneck", config | outer | {"config": config["config"] | inner})


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_configs_are_sound(kind: str) -> None:
    assert parse(KINDS[kind][0], TENSORS[kind], SPEC, MAX_RANK).details()
