"""The training-side bottleneck module: AdapterHub's formula, names and files, on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftserve.demo.bottleneck_module import CONFIG_FILE, WEIGHTS_FILE, BottleneckAdapters

IDS = torch.tensor([[5, 17, 3, 42, 8]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


def _randomize(adapters: BottleneckAdapters) -> None:
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.5)


@torch.inference_mode()
def _logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def test_untrained_adapters_change_nothing(model: LlamaForCausalLM) -> None:
    before = _logits(model)
    BottleneckAdapters(model, "demo", reduction_factor=8)
    assert torch.equal(_logits(model), before)


def test_each_layer_output_gets_the_adapter_of_the_formula(model: LlamaForCausalLM) -> None:
    adapters = BottleneckAdapters(model, "demo", reduction_factor=8)
    _randomize(adapters)
    actual = _logits(model)
    adapters.detach()
    with torch.inference_mode():
        x = model.model.embed_tokens(IDS)
        rotary = model.model.rotary_emb(x, torch.arange(IDS.shape[1])[None])
        mask = torch.full((IDS.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for layer, adapter in zip(model.model.layers, adapters, strict=True):
            x = layer(x, attention_mask=mask, position_embeddings=rotary)
            weights = adapter.state_dict()
            down = x @ weights["adapter_down.0.weight"].T + weights["adapter_down.0.bias"]
            x = x + down.clamp(min=0) @ weights["adapter_up.weight"].T + weights["adapter_up.bias"]
        expected = model.lm_head(model.model.norm(x))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_detach_gives_the_bare_model_back(model: LlamaForCausalLM) -> None:
    before = _logits(model)
    adapters = BottleneckAdapters(model, "demo", reduction_factor=8)
    _randomize(adapters)
    assert not torch.equal(_logits(model), before)
    adapters.detach()
    assert torch.equal(_logits(model), before)


def test_saved_files_have_adapterhub_names_and_load_again(model: LlamaForCausalLM, tmp_path: Path) -> None:
    adapters = BottleneckAdapters(model, "demo", reduction_factor=8)
    _randomize(adapters)
    adapters.save(tmp_path, "org/base", torch.float32)
    expected = _logits(model)
    adapters.detach()

    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / WEIGHTS_FILE).items()}
    prefix = "model.layers.1.output_adapters.adapters.demo."
    assert len(shapes) == 8
    assert {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)} == {
        "adapter_down.0.weight": (4, 32),
        "adapter_down.0.bias": (4,),
        "adapter_up.weight": (32, 4),
        "adapter_up.bias": (32,),
    }
    BottleneckAdapters.load(model, tmp_path)
    assert torch.equal(_logits(model), expected)


def test_another_configuration_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    adapters = BottleneckAdapters(model, "demo", reduction_factor=8)
    adapters.save(tmp_path, "org/base", torch.float32)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["config"]["use_gating"] = True
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a plain SeqBnConfig"):
        BottleneckAdapters.load(model, tmp_path)
