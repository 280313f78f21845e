"""config.json -> ModelSpec, with transformers' own configuration classes as the oracle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftserve.errors import ConfigurationError, UnsupportedModelError
from peftserve.model.config_reader import parse_config, read_spec
from peftserve.model.spec import RopeScaling
from tests.tiny_models import CONFIGS, make_checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
}


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_family_reads_as_transformers_has_it(variant: str, tmp_path: Path) -> None:
    config = CONFIGS[variant]()
    config.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert spec.name == config.model_type == variant.split("_")[0]
    assert spec.hidden_size == config.hidden_size
    assert spec.intermediate_size == config.intermediate_size
    assert spec.num_layers == config.num_hidden_layers
    assert (spec.num_heads, spec.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert spec.head_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.rms_norm_eps == config.rms_norm_eps
    sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    assert list(spec.sliding_layers) == (sliding if any(sliding) else [])


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, peftserve.model.config_reader, peftserve.model.prepare, peftserve.model.pull\n"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_a_config_of_transformers_4_reads_like_one_of_5() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = parse_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}})
    new = parse_config({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    assert old == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=512)


def test_the_oldest_spelling_of_linear_scaling() -> None:
    spec = parse_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert spec.rope_scaling is not None
    assert (spec.rope_scaling.kind, spec.rope_scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("model_type", "absent", "expected"),
    [
        ("llama", {}, {"num_kv_heads": 4, "rope_theta": 10_000.0, "tie_word_embeddings": False}),
        ("smollm3", {}, {"num_kv_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "nope_layers": (3,)}),
        ("mistral", {"num_key_value_heads": 2}, {"sliding_window": 4096, "attention_bias": False}),
        ("qwen2", {"num_key_value_heads": 2}, {"attention_bias": True, "attention_out_bias": False}),
        ("qwen3", {"num_key_value_heads": 2}, {"head_dim": 128, "qk_norm": True, "sliding_window": None}),
    ],
)
def test_absent_keys_take_the_defaults_of_their_family(
    model_type: str, absent: dict[str, Any], expected: dict[str, Any]
) -> None:
    spec = parse_config({**LLAMA, **absent, "model_type": model_type})
    assert {name: getattr(spec, name) for name in expected} == expected


def test_smollm3_slides_over_its_nope_layers() -> None:
    config = {**LLAMA, "model_type": "smollm3", "use_sliding_window": True, "sliding_window": 16}
    spec = parse_config(config)
    assert (spec.sliding_window, spec.sliding_layers) == (16, (False, False, False, True))


def test_a_window_that_is_switched_off_is_no_window() -> None:
    spec = parse_config({**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 16})
    assert (spec.sliding_window, spec.sliding_layers) == (None, ())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "RoPE scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "RoPE scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor -1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"attention_multiplier": 0.1}, "attention_multiplier 0.1"),
        ({"sliding_window": 128}, "sliding_window is not part of the llama architecture"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"hidden_size": "64"}, "hidden_size '64'"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"hidden_size": 96}, "hidden_size 96 is not a multiple of 64"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not a multiple of 64"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"attention_bias": "yes"}, "attention_bias 'yes'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "LLM.int8()"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}}, "'fp4'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "'fp4'"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["linear_attention"] * 4},
            "layer_types 'linear_attention'",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UnsupportedModelError, match="Supported: llama") as caught:
        parse_config({**LLAMA, **changes})
    assert any(fault in text for text in caught.value.faults), caught.value.faults


def test_all_faults_are_found_at_once() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config({**LLAMA, "hidden_act": "gelu", "rope_scaling": {"type": "yarn"}, "intermediate_size": None})
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("content", [None, "", "[]", "{", "\ufeff{}"])
def test_an_unreadable_config_is_an_error_that_names_it(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        read_spec(tmp_path)


def _folder(path: Path, **files: Any) -> Path:
    for name, content in {"config": LLAMA, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_stop_tokens_are_gathered_from_every_file_that_names_one(tmp_path: Path) -> None:
    added = [{"id": 9, "content": "<|im_end|>", "special": True}, {"id": 10, "content": "<x>", "special": True}]
    folder = _folder(
        tmp_path,
        config={**LLAMA, "eos_token_id": 7},
        generation_config={"eos_token_id": [7, 8]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
        tokenizer={"added_tokens": added, "model": {"type": "BPE"}},
    )
    assert read_spec(folder).stop_token_ids == {7, 8, 9}


def test_no_stop_tokens_at_all(tmp_path: Path) -> None:
    assert read_spec(_folder(tmp_path)).stop_token_ids == frozenset()


def test_a_whole_checkpoint_reads(tmp_path: Path) -> None:
    spec = read_spec(make_checkpoint("llama", tmp_path))
    assert (spec.bos_token_id, spec.stop_token_ids) == (1, {2})
