import dataclasses
from typing import Any

import numpy as np
import pytest

from peftserve.adapters.formats import PrefixAdapter
from peftserve.adapters.formats import prefix as prefix_format
from tests.adapters.files import SPEC, check, faults, prefix

BASE = "the base (llama, 3 layers, hidden size 32, 4 heads, 2 KV heads of 8, FFN size 48)"


def test_key_and_value_are_paired_per_layer() -> None:
    files = prefix(5)
    adapter = check(files)
    assert isinstance(adapter, PrefixAdapter)
    assert adapter.key.shape == adapter.value.shape == (3, 2, 5, 8)
    stored = files[1]["prompt_embeddings"]
    for layer, head, token in ((0, 0, 0), (2, 1, 4), (1, 0, 3)):
        begin = layer * 2 * SPEC.kv_size + head * SPEC.head_dim
        np.testing.assert_array_equal(adapter.key[layer, head, token], stored[token, begin : begin + 8])
        begin += SPEC.kv_size
        np.testing.assert_array_equal(adapter.value[layer, head, token], stored[token, begin : begin + 8])
    assert adapter.details() == {
        "source_format": "peft",
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 5,
        "layers": 3,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"prefix_projection": True, "encoder_hidden_size": 64},
        {"num_layers": None, "token_dim": None, "num_attention_heads": None, "num_transformer_submodules": 1},
        {"init_weights": "zero", "modules_to_save": None, "task_type": "CAUSAL_LM", "inference_mode": True},
    ],
)
def test_accepts_what_changes_nothing(change: dict[str, Any]) -> None:
    assert check(prefix(**change)).details()["num_virtual_tokens"] == 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_layers": 30}, f"config field num_layers: 30, expected 3 (layers of {BASE})"),
        ({"num_attention_heads": 4}, f"config field num_attention_heads: 4, expected 2 (KV heads of {BASE})"),
        ({"token_dim": 32}, f"config field token_dim: 32, expected 16 (KV heads times head size of {BASE})"),
        ({"token_dim": 16.0}, f"config field token_dim: 16.0, expected 16 (KV heads times head size of {BASE})"),
        ({"num_transformer_submodules": 2}, "config field num_transformer_submodules: must be 1; encoder-decoder"),
        ({"modules_to_save": ["lm_head"]}, 'config field modules_to_save (["lm_head"]): fully trained modules are not'),
        ({"task_type": "SEQ_2_SEQ_LM"}, "config field task_type ('SEQ_2_SEQ_LM'): only CAUSAL_LM"),
        ({"new_switch": "on"}, "config field 'new_switch' ('on'): not known here"),
        (
            {"num_virtual_tokens": None},
            "config field num_virtual_tokens: must be a whole number of at least 1; got null",
        ),
    ],
)
def test_refuses_by_name(change: dict[str, Any], expected: str) -> None:
    config, arrays = prefix()
    found = faults((config | change, arrays))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_wrong_number_of_tokens() -> None:
    config, arrays = prefix(5)
    assert faults((config | {"num_virtual_tokens": 6}, arrays)) == [
        "tensor 'prompt_embeddings': wrong shape, expected [6, 96] but got [5, 96] "
        f"(6 virtual tokens by K and V, 16 wide each, of the layers of {BASE})"
    ]


def test_a_prefix_longer_than_the_context() -> None:
    assert faults(prefix(128)) == [
        "config field num_virtual_tokens: 128 tokens leave no room in the base's context of 128"
    ]
    assert faults(prefix(127)) == []


def test_missing_and_unexpected_tensors() -> None:
    config, arrays = prefix()
    assert faults((config, {"embedding.weight": arrays["prompt_embeddings"]})) == [
        f"tensor 'prompt_embeddings' is missing (5 virtual tokens by K and V, 16 wide each, of the layers of {BASE})",
        "tensor 'embedding.weight' matches nothing: a prefix file holds prompt_embeddings only",
    ]


def test_not_finite() -> None:
    config, arrays = prefix()
    arrays["prompt_embeddings"][0, :3] = np.nan
    assert faults((config, arrays)) == ["tensor 'prompt_embeddings': 3 of its values are NaN or infinite"]


def test_every_field_of_peft_is_classified() -> None:
    from peft import PrefixTuningConfig

    known = prefix_format.HONOURED | prefix_format.HARMLESS | prefix_format.REFUSED.keys()
    assert {field.name for field in dataclasses.fields(PrefixTuningConfig)} - known == set()
