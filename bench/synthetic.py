"""Adapters of any size with random weights, in the formats that PEFT and AdapterHub save.

What an adapter costs does not depend on its values. They are small, so that activations stay finite, and bf16, as
half-precision training leaves them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peftserve.adapters.store import AdapterStore
from peftserve.model.layout import module_name
from peftserve.model.spec import TARGET_NAMES, ModelSpec, targets
from peftserve.types import AdapterRef

TENANT = "default"
_SCALE = 0.02

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The two files of an adapter, in memory."""

    config: bytes
    weights: bytes

    def write(self, folder: Path) -> Path:
        """Save them into `folder`, which is made; returns it."""
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_bytes(self.config)
        (folder / WEIGHTS_FILE).write_bytes(self.weights)
        return folder


def lora(
    spec: ModelSpec,
    rank: int,
    *,
    seed: int,
    modules: Sequence[str] = TARGET_NAMES,
    layers: Sequence[int] | None = None,
) -> AdapterFiles:
    """PEFT's LoRA of `rank` on `modules` of all layers, or of those in `layers`."""
    random = _Random(seed)
    tensors = {}
    for layer in range(spec.num_layers) if layers is None else layers:
        for target in targets(spec):
            if target.name in modules:
                stem = f"base_model.model.{module_name(layer, target.name)}"
                tensors[f"{stem}.lora_A.weight"] = random.matrix(rank, target.in_features)
                tensors[f"{stem}.lora_B.weight"] = random.matrix(target.out_features, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "layers_to_transform": None if layers is None else list(layers),
        "inference_mode": True,
    }
    return _files(config, tensors)


def prefix(spec: ModelSpec, num_tokens: int, *, seed: int) -> AdapterFiles:
    """PEFT's prefix of `num_tokens` virtual tokens."""
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": num_tokens,
        "num_layers": spec.num_layers,
        "num_attention_heads": spec.num_kv_heads,
        "token_dim": spec.kv_size,
        "inference_mode": True,
    }
    width = 2 * spec.num_layers * spec.kv_size
    return _files(config, {"prompt_embeddings": _Random(seed).matrix(num_tokens, width)})


def bottleneck(spec: ModelSpec, width: int, *, seed: int) -> AdapterFiles:
    """AdapterHub's Houlsby adapter of `width`: after attention and after the FFN of every layer."""
    random = _Random(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for place in ("attention_adapters", "output_adapters"):
            stem = f"model.layers.{layer}.{place}.adapters.bench"
            tensors[f"{stem}.adapter_down.0.weight"] = random.matrix(width, spec.hidden_size)
            tensors[f"{stem}.adapter_down.0.bias"] = random.matrix(width)
            tensors[f"{stem}.adapter_up.weight"] = random.matrix(spec.hidden_size, width)
            tensors[f"{stem}.adapter_up.bias"] = random.matrix(spec.hidden_size)
    inner = {
        "mh_adapter": True,
        "output_adapter": True,
        "reduction_factor": spec.hidden_size / width,
        "non_linearity": "swish",
    }
    outer = {"hidden_size": spec.hidden_size, "model_type": "llama", "name": "bench", "version": "adapters.1.3.0"}
    return _files(outer | {"config": inner}, tensors)


def publish(store: AdapterStore, name: str, files: AdapterFiles) -> AdapterRef:
    """Put an adapter straight into the store, as an upload would."""
    with store.new_upload(TENANT, name) as upload:
        upload.write_config(files.config)
        upload.write_weights(files.weights)
        return upload.commit().ref


class _Random:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self._generator) * _SCALE).bfloat16()


def _files(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AdapterFiles:
    return AdapterFiles(json.dumps(config).encode(), save(tensors))
