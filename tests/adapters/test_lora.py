import dataclasses
from typing import Any

import numpy as np
import pytest

from peftserve.adapters.formats import LoraAdapter
from peftserve.adapters.formats import lora as lora_format
from peftserve.model.spec import TARGET_NAMES
from tests.adapters.files import Arrays, check, faults, lora, module_name

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
BASE = "the base (llama, 3 layers, hidden size 32, 4 heads, 2 KV heads of 8, FFN size 48)"


def parsed(files: tuple[dict[str, Any], Arrays], max_rank: int = 16) -> LoraAdapter:
    adapter = check(files, max_rank=max_rank)
    assert isinstance(adapter, LoraAdapter)
    return adapter


def test_reads_all_modules() -> None:
    files = lora(TARGET_NAMES, rank=3)
    adapter = parsed(files)
    assert adapter.modules.keys() == {(layer, target) for layer in range(3) for target in range(7)}
    module = adapter.modules[0, 0]
    assert (module.rank, module.scale) == (3, 8 / 3)
    np.testing.assert_array_equal(module.a.float32(), files[1][A0])
    np.testing.assert_array_equal(module.b.float32(), files[1][B0])
    assert adapter.details() == {
        "source_format": "peft",
        "rank": 3,
        "ranks": [3],
        "scales": [8 / 3],
        "target_modules": list(TARGET_NAMES),
        "layers": 3,
        "use_dora": False,
        "padded_weights": 8 * sum(m.a.shape[1] + m.b.shape[0] for m in adapter.modules.values()),
        "padded_rows": 8 * 3 * 7,
        "vector_weights": 0,
    }


def test_dora() -> None:
    files = lora(TARGET_NAMES, rank=3, use_dora=True)
    adapter = parsed(files)
    for (layer, target), module in adapter.modules.items():
        assert module.magnitude is not None
        name = f"base_model.model.{module_name(layer, TARGET_NAMES[target])}.lora_magnitude_vector"
        np.testing.assert_array_equal(module.magnitude.float32(), files[1][name])
    details = adapter.details()
    assert details["use_dora"]
    assert details["padded_weights"] == sum(8 * m.a.shape[1] + 10 * m.b.shape[0] for m in adapter.modules.values())
    assert details["vector_weights"] == sum(2 * m.b.shape[0] for m in adapter.modules.values())


def test_magnitudes_that_do_not_fit() -> None:
    config, arrays = lora(use_dora=True)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    whole = arrays.pop(stem)
    assert [fault.split(" (")[0] for fault in faults((config, arrays))] == [f"tensor '{stem}' is missing"]
    arrays[stem] = whole[:-1]
    assert f"tensor '{stem}'" in faults((config, arrays))[0]
    assert "the 32 outputs of q_proj" in faults((config, arrays))[0]
    arrays[stem] = np.full_like(whole, np.inf)
    assert "NaN or infinite" in faults((config, arrays))[0]
    arrays[stem] = whole
    assert faults((config | {"use_dora": False}, arrays)) == [
        f"tensor '{name}' matches nothing: it belongs to DoRA, which the config does not turn on (use_dora)"
        for name in sorted(arrays)
        if "magnitude" in name
    ]
    arrays[stem.replace("q_proj", "k_proj")] = whole
    assert "the config does not target this module" in faults((config, arrays))[0]


def test_rslora_scale() -> None:
    assert parsed(lora(use_rslora=True)).modules[0, 0].scale == 8 / 2


def test_rank_and_alpha_patterns() -> None:
    config, arrays = lora(rank=4)
    config |= {
        "rank_pattern": {"layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {"^model.layers.0.*": 1.5, "v_proj": 6},
    }
    for half, part in (("A", np.s_[:2]), ("B", np.s_[:, :2])):
        name = f"base_model.model.model.layers.1.self_attn.v_proj.lora_{half}.weight"
        arrays[name] = np.ascontiguousarray(arrays[name][part])
    adapter = parsed((config, arrays))
    assert [adapter.modules[layer, 2].rank for layer in range(3)] == [4, 2, 4]
    assert [adapter.modules[layer, 2].scale for layer in range(3)] == [1.5 / 4, 6 / 2, 6 / 4]
    assert [adapter.modules[layer, 0].scale for layer in range(3)] == [1.5 / 4, 2.0, 2.0]


@pytest.mark.parametrize(
    "change",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": [f"model.layers.{i}.self_attn.{t}" for i in (0, 2) for t in ("q_proj", "v_proj")]},
        {"target_modules": r"model\.layers\.[02]\.self_attn\.(q|v)_proj"},
        {"exclude_modules": ["layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
        {"exclude_modules": r".*layers\.1\..*"},
    ],
)
def test_layers_may_be_left_out(change: dict[str, Any]) -> None:
    config, arrays = lora()
    adapter = parsed((config | change, {name: array for name, array in arrays.items() if ".1." not in name}))
    assert {layer for layer, _ in adapter.modules} == {0, 2}


def test_all_linear_means_every_layer_but_the_head() -> None:
    config, arrays = lora(TARGET_NAMES)
    assert len(parsed((config | {"target_modules": "all-linear"}, arrays)).modules) == 21


def test_missing_tensor() -> None:
    config, arrays = lora()
    del arrays[B0]
    assert faults((config, arrays)) == [f"tensor '{B0}' is missing (the 32 outputs of q_proj in {BASE} by rank 4)"]


def test_wrong_shape() -> None:
    config, arrays = lora()
    arrays[A0] = np.zeros((4, 2048), np.float32)
    assert faults((config, arrays)) == [
        f"tensor '{A0}': wrong shape, expected [4, 32] but got [4, 2048] (rank 4 by the 32 inputs of q_proj in {BASE})"
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad: float) -> None:
    config, arrays = lora()
    arrays[A0][1, 7] = bad
    assert faults((config, arrays)) == [f"tensor '{A0}': 1 of its values are NaN or infinite"]


def test_rank_in_the_config_must_be_the_tensors() -> None:
    found = faults(lora(rank=4, r=8))
    assert len(found) == 12
    assert "expected [8, 32] but got [4, 32]" in found[0]


def test_rank_limit() -> None:
    assert faults(lora(rank=17)) == [
        "rank 17 (at model.layers.0.self_attn.q_proj) is above this server's limit of 16 (max_adapter_rank)"
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lora_bias": True}, "config field lora_bias (true): a bias on lora_B is not supported yet"),
        ({"bias": "all"}, "config field bias ('all'): trained biases are not supported, only 'none'"),
        ({"fan_in_fan_out": True}, "config field fan_in_fan_out (true): transposed layers (Conv1D) do not exist"),
        ({"modules_to_save": ["lm_head"]}, 'config field modules_to_save (["lm_head"]): fully trained modules'),
        ({"use_qalora": True}, "config field use_qalora (true): QA-LoRA is not supported yet"),
        ({"alora_invocation_tokens": [1]}, "config field alora_invocation_tokens ([1]): activated LoRA (aLoRA)"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "config field trainable_token_indices"),
        ({"target_parameters": ["experts.down_proj"]}, "config field target_parameters"),
        ({"megatron_config": {"a": 1}}, "config field megatron_config"),
        ({"arrow_config": {"top_k": 2}}, "config field arrow_config"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "config field layer_replication"),
        ({"init_lora_weights": "pissa"}, "field init_lora_weights ('pissa'): this changes the base model's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "('pissa_niter_16'): this changes the base model's weights"),
        ({"init_lora_weights": "olora"}, "('olora'): this changes the base model's weights"),
        ({"init_lora_weights": "loftq"}, "('loftq'): this changes the base model's weights"),
        ({"init_lora_weights": "corda"}, "('corda'): this changes the base model's weights"),
        ({"init_lora_weights": "lora_ga"}, "('lora_ga'): this changes the base model's weights"),
        ({"init_lora_weights": "brand_new"}, "config field init_lora_weights ('brand_new'): not known here"),
        ({"task_type": "SEQ_CLS"}, "config field task_type ('SEQ_CLS'): only CAUSAL_LM adapters generate text"),
        ({"use_warp_drive": 3}, "config field 'use_warp_drive' (3): not known here, and it could change what"),
        ({"r": 0}, "config field r: must be a whole number of at least 1; got 0"),
        ({"r": True}, "config field r: must be a whole number of at least 1; got true"),
        ({"r": 10**40}, "config field r: must be a whole number of at least 1; got a huge number"),
        ({"lora_alpha": "8"}, "config field lora_alpha: must be a number; got '8'"),
        ({"lora_alpha": 10**400}, "config field lora_alpha: must be a number; got a huge number"),
        ({"use_rslora": 1}, "config field use_rslora: must be true or false; got 1"),
        ({"rank_pattern": [1]}, "config field rank_pattern: must be an object of module name -> a whole number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' must have a whole number of at least 1; got 0"),
        ({"alpha_pattern": {"q_proj": None}}, "config field alpha_pattern: 'q_proj' must have a number; got null"),
        ({"alpha_pattern": {"layers.9.x": 1}}, "alpha_pattern: key 'layers.9.x' matches no module of the base"),
        ({"target_modules": None}, "target_modules: must be module names in a list, or a pattern; got null"),
        ({"target_modules": [3]}, "target_modules: must be module names in a list, or a pattern; got [3]"),
        ({"target_modules": "(?!v).*"}, "config field target_modules: not a regular expression that can be evaluated"),
        ({"target_modules": ["c_attn"]}, f"config field target_modules (['c_attn']): names no linear layer of {BASE}"),
        ({"layers_to_transform": ["0"]}, 'config field layers_to_transform: must be layer numbers; got ["0"]'),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            "config field layers_to_transform: cannot be combined with a target_modules that is a string",
        ),
        (
            {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h"]},
            "config field layers_pattern ('h'): the layers of this base are named 'layers'",
        ),
    ],
)  # fmt: skip
def test_refuses_by_name(change: dict[str, Any], expected: str) -> None:
    config, arrays = lora()
    assert any(expected in fault for fault in faults((config | change, arrays)))


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": value}
        for value in (True, False, None, "gaussian", "eva", "orthogonal", "mica")
    ] + [
        {"use_dora": False, "modules_to_save": None, "trainable_token_indices": [], "megatron_config": {}},
        {"from_a_newer_version": None, "another": False, "third": [], "fourth": {}, "fifth": ""},
        {"lora_dropout": 0.5, "inference_mode": True, "auto_mapping": {"a": "b"}, "task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj", "v_proj", "c_attn"]},
        {"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}, "qalora_group_size": 32},
    ],
)  # fmt: skip
def test_accepts_what_changes_nothing(change: dict[str, Any]) -> None:
    config, arrays = lora()
    assert len(parsed((config | change, arrays)).modules) == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (module_name(0, "k_proj") + ".lora_A.weight", "the config does not target this module"),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", f"{BASE} has no module of this name"),
        (module_name(0, "q_proj") + ".lora_B.bias", "a bias on lora_B is not supported yet"),
        ("model.embed_tokens.lora_embedding_A", "LoRA on embeddings is not supported yet"),
        ("lm_head.base_layer.weight", "it is a weight of the base model; adapters cannot bring their own"),
        ("lm_head.weight", "changing the output head is not supported yet"),
        ("something.else", "a LoRA file holds base_model.model.<module>.lora_A.weight and .lora_B.weight only"),
    ],
)
def test_a_tensor_that_matches_nothing(name: str, expected: str) -> None:
    config, arrays = lora()
    full = f"base_model.model.{name}"
    arrays[full] = np.zeros((4, 32), np.float32)
    assert faults((config, arrays)) == [f"tensor '{full}' matches nothing: {expected}" + (
        " (target_modules, exclude_modules, layers_to_transform)" if "does not target" in expected else ""
    )]  # fmt: skip


@pytest.mark.parametrize("head", ["lm_head", "embed_tokens"])
def test_head_and_embedding_targets_are_refused(head: str) -> None:
    assert faults(lora(target_modules=["q_proj", "v_proj", head])) == [
        f"config field target_modules: LoRA on {head} is not supported yet"
    ]


def test_all_faults_at_once() -> None:
    config, arrays = lora(use_qalora=True, surprise=1)
    del arrays[A0]
    arrays[B0][0, 0] = np.nan
    arrays["extra"] = np.zeros(3, np.float32)
    found = faults((config, arrays))
    assert [fault.split(" ")[2 if fault.startswith("config") else 1].strip(":'") for fault in found] == [
        "use_qalora",
        "surprise",
        A0,
        B0,
        "extra",
    ]


def test_every_field_of_peft_is_classified() -> None:
    """A field that PEFT adds must be looked at before it is let through."""
    from peft import LoraConfig

    known = lora_format.HONOURED | lora_format.HARMLESS | lora_format.REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set()
    assert lora_format.HONOURED.isdisjoint(lora_format.HARMLESS)
    assert not (lora_format.HONOURED | lora_format.HARMLESS) & lora_format.REFUSED.keys()


def test_half_precision_files() -> None:
    config, arrays = lora()
    adapter = parsed((config, {name: array.astype(np.float16) for name, array in arrays.items()}))
    assert adapter.modules[2, 2].a.dtype == "F16"
