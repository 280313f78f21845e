import dataclasses
from typing import Any

import numpy as np
import pytest

from peftserve.adapters.formats import PromptAdapter
from peftserve.adapters.formats import prompt as prompt_format
from tests.adapters.files import check, faults, prefix, prompt

BASE = "the base (llama, 3 layers, hidden size 32, 4 heads, 2 KV heads of 8, FFN size 48)"


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING"])
def test_reads_the_embeddings(peft_type: str) -> None:
    files = prompt(5, peft_type=peft_type)
    adapter = check(files)
    assert isinstance(adapter, PromptAdapter)
    np.testing.assert_array_equal(adapter.embeddings.float32(), files[1]["prompt_embeddings"])
    assert adapter.details() == {
        "source_format": "peft",
        "peft_type": peft_type,
        "num_virtual_tokens": 5,
        "layers": 3,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "be kind", "tokenizer_name_or_path": "somewhere"},
        {"peft_type": "P_TUNING", "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7},
        {"num_layers": None, "token_dim": None, "num_attention_heads": None, "modules_to_save": None},
    ],
)
def test_accepts_what_changes_nothing(change: dict[str, Any]) -> None:
    assert check(prompt(**change)).details()["num_virtual_tokens"] == 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_layers": 30}, f"config field num_layers: 30, expected 3 (layers of {BASE})"),
        ({"num_attention_heads": 2}, f"config field num_attention_heads: 2, expected 4 (heads of {BASE})"),
        ({"token_dim": 16}, f"config field token_dim: 16, expected 32 (hidden size of {BASE})"),
        ({"num_transformer_submodules": 2}, "config field num_transformer_submodules: must be 1"),
        ({"modules_to_save": ["lm_head"]}, 'config field modules_to_save (["lm_head"]): fully trained modules are not'),
        ({"task_type": "SEQ_CLS"}, "config field task_type ('SEQ_CLS'): only CAUSAL_LM"),
        ({"prefix_projection": True}, "config field 'prefix_projection' (true): not known here"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], expected: str) -> None:
    config, arrays = prompt()
    found = faults((config | change, arrays))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_tensors_that_do_not_fit() -> None:
    config, arrays = prompt(5)
    wanted = f"6 virtual tokens by the hidden size of {BASE}"
    assert faults((config | {"num_virtual_tokens": 6}, arrays)) == [
        f"tensor 'prompt_embeddings': wrong shape, expected [6, 32] but got [5, 32] ({wanted})"
    ]
    assert "expected [5, 32] but got [5, 96]" in faults((config, prefix(5)[1]))[0]
    arrays["prompt_embeddings"][0, :3] = np.nan
    assert faults((config, arrays)) == ["tensor 'prompt_embeddings': 3 of its values are NaN or infinite"]
    assert faults((config, {"other": arrays["prompt_embeddings"]}))[1] == (
        "tensor 'other' matches nothing: a prompt file holds prompt_embeddings only"
    )


def test_a_prompt_longer_than_the_context() -> None:
    assert faults(prompt(128)) == [
        "config field num_virtual_tokens: 128 tokens leave no room in the base's context of 128"
    ]


def test_every_field_of_peft_is_classified() -> None:
    from peft import PromptEncoderConfig, PromptTuningConfig

    known = prompt_format.HONOURED | prompt_format.HARMLESS | prompt_format.REFUSED.keys()
    for config in (PromptTuningConfig, PromptEncoderConfig):
        assert {field.name for field in dataclasses.fields(config)} - known == set()
