"""Adapter files made in memory: sound ones for every kind on a tiny base, and safetensors bytes of any brokenness."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from peftserve.adapters import manifest, safetensors
from peftserve.adapters.formats import Adapter, parse
from peftserve.adapters.manifest import AdapterRecord
from peftserve.adapters.store import AdapterStore
from peftserve.errors import InvalidAdapterError
from peftserve.model.spec import ModelSpec, targets

Arrays = dict[str, npt.NDArray[Any]]

SPEC = ModelSpec(
    name="llama",
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)
MAX_RANK = 16
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def module_name(layer: int, target: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if target in _ATTENTION else 'mlp'}.{target}"


def lora(
    target_names: tuple[str, ...] = ("q_proj", "v_proj"),
    *,
    rank: int = 4,
    seed: int = 0,
    use_dora: bool = False,
    **config: Any,
) -> tuple[dict[str, Any], Arrays]:
    """A LoRA's config and arrays, or a DoRA's, on all layers of SPEC."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for layer in range(SPEC.num_layers):
        for target in targets(SPEC):
            if target.name in target_names:
                stem = f"base_model.model.{module_name(layer, target.name)}"
                arrays[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, target.in_features), np.float32)
                arrays[f"{stem}.lora_B.weight"] = rng.standard_normal((target.out_features, rank), np.float32)
                if use_dora:
                    arrays[f"{stem}.lora_magnitude_vector"] = rng.standard_normal(target.out_features, np.float32)
    base = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(target_names), "use_dora": use_dora}
    return base | config, arrays


def prefix(num_virtual_tokens: int = 5, *, seed: int = 0, **config: Any) -> tuple[dict[str, Any], Arrays]:
    """A prefix's config and arrays."""
    rng = np.random.default_rng(seed)
    width = SPEC.num_layers * 2 * SPEC.kv_size
    base = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": num_virtual_tokens,
        "num_layers": SPEC.num_layers,
        "num_attention_heads": SPEC.num_kv_heads,
        "token_dim": SPEC.kv_size,
    }
    return base | config, {"prompt_embeddings": rng.standard_normal((num_virtual_tokens, width), np.float32)}


def prompt(num_virtual_tokens: int = 5, *, seed: int = 0, **config: Any) -> tuple[dict[str, Any], Arrays]:
    """A prompt's config and arrays."""
    rng = np.random.default_rng(seed)
    base = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": num_virtual_tokens,
        "num_layers": SPEC.num_layers,
        "num_attention_heads": SPEC.num_heads,
        "token_dim": SPEC.hidden_size,
    }
    return base | config, {"prompt_embeddings": rng.standard_normal((num_virtual_tokens, SPEC.hidden_size), np.float32)}


def bottleneck(*, width: int = 8, seed: int = 0, **config: Any) -> tuple[dict[str, Any], Arrays]:
    """A Houlsby adapter's config and arrays; `config` changes the inner config only."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for layer in range(SPEC.num_layers):
        for place in ("attention_adapters", "output_adapters"):
            stem = f"model.layers.{layer}.{place}.adapters.demo"
            arrays[f"{stem}.adapter_down.0.weight"] = rng.standard_normal((width, SPEC.hidden_size), np.float32)
            arrays[f"{stem}.adapter_down.0.bias"] = rng.standard_normal(width, np.float32)
            arrays[f"{stem}.adapter_up.weight"] = rng.standard_normal((SPEC.hidden_size, width), np.float32)
            arrays[f"{stem}.adapter_up.bias"] = rng.standard_normal(SPEC.hidden_size, np.float32)
    inner = {
        "mh_adapter": True,
        "output_adapter": True,
        "reduction_factor": SPEC.hidden_size / width,
        "non_linearity": "swish",
    }
    outer = {"hidden_size": SPEC.hidden_size, "model_type": "llama", "name": "demo", "version": "adapters.1.3.0"}
    return outer | {"config": inner | config}, arrays


def check(files: tuple[dict[str, Any], Arrays], *, spec: ModelSpec = SPEC, max_rank: int = MAX_RANK) -> Adapter:
    """Parse files made here, through their bytes."""
    config, arrays = files
    parsed = manifest.read_config(json.dumps(config).encode())
    return parse(parsed, safetensors.read(save(arrays)), spec, max_rank)


def faults(files: tuple[dict[str, Any], Arrays], *, spec: ModelSpec = SPEC, max_rank: int = MAX_RANK) -> list[str]:
    """What `check` complains of."""
    try:
        check(files, spec=spec, max_rank=max_rank)
    except InvalidAdapterError as error:
        return error.faults
    return []


def push(store: AdapterStore, tenant: str, name: str, files: tuple[dict[str, Any], Arrays]) -> AdapterRecord:
    """Upload files made here."""
    config, arrays = files
    with store.new_upload(tenant, name) as upload:
        upload.write_config(json.dumps(config).encode())
        upload.write_weights(save(arrays))
        return upload.commit()


def raw_safetensors(header: Mapping[str, Any] | bytes, body: bytes = b"", *, announce: int | None = None) -> bytes:
    """Safetensors bytes with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if announce is None else announce).to_bytes(8, "little") + text + body
