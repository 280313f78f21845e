"""What PEFT saves is what we read: the same weights, the same scales, for adapters made and loaded by PEFT itself."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM

from peftserve.adapters import manifest, safetensors
from peftserve.adapters.formats import Adapter, LoraAdapter, PrefixAdapter, PromptAdapter, parse
from peftserve.adapters.formats.lora_targets import module_names
from peftserve.errors import InvalidAdapterError
from peftserve.model.spec import TARGET_NAMES
from tests.adapters.files import SPEC

# PEFT's and transformers' own, on the way to saving a file.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Failed to load CPU gemm_4bit_forward",
    "ignore:Could not find a config file",
    "ignore:Setting `save_embedding_layers`",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:PiSSA changes the base weights",
)


def base_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SPEC.hidden_size,
        intermediate_size=SPEC.intermediate_size,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=SPEC.num_heads,
        num_key_value_heads=SPEC.num_kv_heads,
        head_dim=SPEC.head_dim,
        vocab_size=SPEC.vocab_size,
    )
    return LlamaForCausalLM(config)


def save(config: PeftConfig, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = get_peft_model(base_model(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return model


def read(folder: Path) -> Adapter:
    config = manifest.read_config((folder / "adapter_config.json").read_bytes())
    tensors = safetensors.read((folder / "adapter_model.safetensors").read_bytes())
    return parse(config, tensors, SPEC, 64)


def assert_same_deltas(model: Any, adapter: Adapter) -> None:
    """scale * B A of every module is PEFT's own, and so are a DoRA's magnitudes; both adapt the same modules."""
    assert isinstance(adapter, LoraAdapter)
    linears: dict[str, Any] = dict(model.base_model.model.named_modules())
    adapted = {
        (layer, target.index): linears[name]
        for name, (layer, target) in module_names(SPEC).items()
        if hasattr(linears[name], "lora_A")
    }
    assert adapter.modules.keys() == adapted.keys()
    for where, module in adapter.modules.items():
        theirs = adapted[where].get_delta_weight("default").float().detach().numpy()
        np.testing.assert_allclose(module.scale * module.b.float32() @ module.a.float32(), theirs, rtol=1e-5, atol=1e-5)
        magnitudes = getattr(adapted[where], "lora_magnitude_vector", None)
        assert (module.magnitude is not None) == bool(magnitudes)
        if module.magnitude is not None and magnitudes:
            expected = magnitudes["default"].weight.float().detach().numpy()
            np.testing.assert_array_equal(module.magnitude.float32(), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 1, "target_modules": ["q_proj"]},
        {"r": 8, "lora_alpha": 3, "target_modules": list(TARGET_NAMES)},
        {"r": 4, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": r".*self_attn\.(q|v)_proj"},
        {"r": 4, "target_modules": ["up_proj", "down_proj"], "layers_to_transform": [0, 2]},
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "exclude_modules": r"model\.layers\.1\..*"},
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2, "q_proj": 6, "mlp.down_proj": 3},
            "alpha_pattern": {"^model.layers.2.self_attn.v_proj": 5, "v_proj": 2},
            "use_rslora": True,
        },
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "mica"},
        {"r": 4, "target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ],
)
def test_lora(config: dict[str, Any], tmp_path: Path) -> None:
    model = save(LoraConfig(task_type="CAUSAL_LM", **config), tmp_path)
    assert_same_deltas(model, read(tmp_path))


def test_lora_keys_in_the_order_of_the_file(tmp_path: Path) -> None:
    """PEFT takes the first matching pattern of the file, so a rewritten config must not be sorted."""
    save(LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern={"q_proj": 5}), tmp_path)
    config = tmp_path / "adapter_config.json"
    for first, second in (("q_proj", "layers.0.self_attn.q_proj"), ("layers.0.self_attn.q_proj", "q_proj")):
        text = re.sub(
            r'"alpha_pattern": \{[^}]*\}', f'"alpha_pattern": {{"{first}": 3, "{second}": 7}}', config.read_text()
        )
        config.write_text(text)
        adapter = read(tmp_path)
        assert_same_deltas(PeftModel.from_pretrained(base_model(), tmp_path), adapter)
        config.write_bytes(manifest.canonical_config(manifest.read_config(config.read_bytes())))
        assert_same_deltas(PeftModel.from_pretrained(base_model(), tmp_path), read(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path, dtype=dtype)
    adapter = read(tmp_path)
    assert isinstance(adapter, LoraAdapter)
    theirs = model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"].weight
    np.testing.assert_array_equal(adapter.modules[1, 2].a.float32(), theirs.float().detach().numpy())


def test_lora_converted_from_pissa(tmp_path: Path) -> None:
    """PiSSA itself is refused; PEFT's own conversion to a plain LoRA is read, at twice the rank."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model: Any = get_peft_model(base_model(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "plain_pissa")
    with pytest.raises(InvalidAdapterError, match="changes the base model's weights"):
        read(tmp_path / "plain_pissa")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    adapter = read(tmp_path / "converted")
    assert isinstance(adapter, LoraAdapter)
    assert {module.rank for module in adapter.modules.values()} == {4}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("num_virtual_tokens", [1, 7])
def test_prefix(num_virtual_tokens: int, projection: bool, tmp_path: Path) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_virtual_tokens,
        prefix_projection=projection,
        encoder_hidden_size=24,
    )
    model = save(config, tmp_path)
    adapter = read(tmp_path)
    assert isinstance(adapter, PrefixAdapter)
    cache = model.get_prompt(batch_size=1)
    for layer in range(SPEC.num_layers):
        keys, values = cache.layers[layer].keys[0], cache.layers[layer].values[0]
        np.testing.assert_allclose(adapter.key[layer], keys.detach().numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(adapter.value[layer], values.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=24, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=1, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"),
    ],
)
def test_prompt(config: PeftConfig, tmp_path: Path) -> None:
    model = save(config, tmp_path)
    adapter = read(tmp_path)
    assert isinstance(adapter, PromptAdapter)
    expected = model.eval().get_prompt(batch_size=1)[0].detach().numpy()
    np.testing.assert_allclose(adapter.embeddings.float32(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(target_modules=["lm_head", "q_proj"]), "LoRA on lm_head is not supported yet"),
        (lambda: LoraConfig(target_modules=["embed_tokens", "q_proj"]), "LoRA on embed_tokens is not supported yet"),
        (lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3 is not supported yet"),
    ],
)
def test_refuses_what_is_not_served(make: Callable[[], PeftConfig], message: str, tmp_path: Path) -> None:
    save(make(), tmp_path)
    with pytest.raises(InvalidAdapterError) as caught:
        read(tmp_path)
    assert message in " ".join(caught.value.faults)
