"""Reading a GGUF file: its configuration and its tensors as a Hugging Face checkpoint would hold them.

Keys and tensor names: llama.cpp's gguf-py (`constants.py`) and convert_hf_to_gguf.py. Values are dequantised by the
gguf package, one tensor at a time.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize

from peftserve.errors import ConfigurationError, UnsupportedModelError
from peftserve.model.layout import EMBEDDING, FINAL_NORM, LM_HEAD

_ARCHITECTURES = ("llama", "smollm3", "qwen2", "qwen3")

# convert_hf_to_gguf.py interleaves the two rotary halves of q and k for these, because ggml rotates neighbours there.
_PERMUTED = ("llama", "smollm3")

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_ROPE_FACTORS = "rope_freqs.weight"

_READ_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
}
_HARMLESS_KEYS = {
    "attention.layer_norm_epsilon",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "pooling_type",
}


class GgufFile:
    """An opened GGUF file. Raises `ConfigurationError` when it is none, `UnsupportedModelError` for other models."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ConfigurationError(f"{path} cannot be read as GGUF: {error}") from error
        self.architecture = self._field("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: GGUF architecture {self.architecture!r} is not implemented. "
                f"Supported: {', '.join(_ARCHITECTURES)} (Mistral files are llama)"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.names = self._hugging_face_names()
        self.config = self._config()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of each tensor."""
        # ggml lists dimensions from the fastest to the slowest
        return {name: tuple(int(n) for n in reversed(self._tensors[t].shape)) for name, t in self.names.items()}

    def metadata(self, key: str) -> Any:
        """A metadata value (`tokenizer.ggml.eos_token_id`), or None."""
        return self._field(key)

    def read(self, name: str) -> torch.Tensor:
        """The tensor that a Hugging Face checkpoint calls `name`: projections and norms float32, embeddings bfloat16.

        Raises `ConfigurationError` when the file lacks it.
        """
        if name not in self.names:
            raise ConfigurationError(f"{self.path}: {name}: missing")
        tensor = self._tensors[self.names[name]]
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if self.architecture in _PERMUTED and re.search(r"\.[qk]_proj\.", name):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            values = _halves_apart(values, heads)
        dense = torch.from_numpy(values if values.flags.writeable else values.copy())
        # 8 bits of mantissa are what quantised embeddings carry, and checkpoints keep theirs in bf16.
        return dense.to(torch.bfloat16) if name in (EMBEDDING, LM_HEAD) else dense

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _hugging_face_names(self) -> dict[str, str]:
        names, unknown = {}, []
        for name in self._tensors:
            layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
            if name in _TOP_TENSORS:
                names[_TOP_TENSORS[name]] = name
            elif layer is not None and layer[2] in _LAYER_TENSORS:
                names[f"model.layers.{layer[1]}.{_LAYER_TENSORS[layer[2]]}.{layer[3]}"] = name
            elif name != _ROPE_FACTORS:
                unknown.append(name)
        if unknown:
            faults = [f"tensor {name} is not implemented" for name in unknown]
            raise UnsupportedModelError(f"{self.path}: {'; '.join(faults[:20])}", faults=faults)
        return names

    def _config(self) -> dict[str, Any]:
        """config.json in transformers' spelling."""
        arch = f"{self.architecture}."
        keys = {key.removeprefix(arch) for key in self._reader.fields if key.startswith(arch)}
        values = {key: self._field(arch + key) for key in keys & _READ_KEYS}
        faults = [f"{arch}{key} is not implemented" for key in sorted(keys - _READ_KEYS - _HARMLESS_KEYS)]
        heads = values.get("attention.head_count")
        head_dim = values.get("attention.key_length") or values.get("rope.dimension_count")
        if values.get("attention.value_length", head_dim) != head_dim:
            faults.append(f"{arch}attention.value_length differs from key_length")
        if values.get("rope.dimension_count", head_dim) != head_dim:
            faults.append(
                f"{arch}rope.dimension_count {values['rope.dimension_count']} is not the head size {head_dim}"
            )
        scaling: dict[str, Any] = {"rope_type": values.get("rope.scaling.type") or "default"}
        if scaling["rope_type"] == "none":
            scaling["rope_type"] = "default"
        if "rope.scaling.factor" in values:
            scaling["factor"] = values["rope.scaling.factor"]
        theta = values.get("rope.freq_base", 10_000.0)
        if _ROPE_FACTORS in self._tensors:
            found = _llama3_scaling(np.asarray(self._tensors[_ROPE_FACTORS].data, dtype=np.float64), theta)
            if found is None:
                faults.append(f"{_ROPE_FACTORS} is not a llama3 scaling")
            else:
                scaling = found
        if faults:
            raise UnsupportedModelError(f"{self.path}: {'; '.join(faults)}", faults=faults)

        window = values.get("attention.sliding_window")
        family = "mistral" if self.architecture == "llama" and window else self.architecture
        config: dict[str, Any] = {
            "architectures": [_MODEL_CLASSES[family]],
            "model_type": family,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": values.get("embedding_length"),
            "intermediate_size": values.get("feed_forward_length"),
            "num_hidden_layers": values.get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": values.get("attention.head_count_kv") or heads,
            "max_position_embeddings": values.get("context_length"),
            "rms_norm_eps": _shortest_float32(values.get("attention.layer_norm_rms_epsilon", 1e-6)),
            "vocab_size": self.shapes.get(EMBEDDING, (None,))[0],
            "tie_word_embeddings": LM_HEAD not in self.names,
            "rope_parameters": {"rope_theta": float(theta), **scaling},
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }
        if head_dim is not None:
            config["head_dim"] = head_dim
        if family in ("llama", "smollm3", "qwen3"):
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.names
        if family in ("llama", "smollm3"):
            config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self.names
        if window:
            config["sliding_window"] = window
            config["use_sliding_window"] = True
        elif family == "qwen2":
            config["use_sliding_window"] = False
        return config


_MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _halves_apart(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, half) order back to (half, pair): undoes `permute` of convert_hf_to_gguf.py."""
    pairs = values.shape[0] // heads // 2
    grouped = values.reshape(heads, pairs, 2, *values.shape[1:])
    return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(values.shape)


def _shortest_float32(value: float) -> float:
    """GGUF holds float32; 9.999999747378752e-06 was written as 1e-5."""
    return float(str(np.float32(value)))


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The llama3 scaling whose divisors are `factors` [head_dim / 2]; GGUF stores them, not their parameters.

    Llama 3.1 and 3.2 all use bands 1 and 4 over 8192 tokens, and differ in the factor alone; None for anything else.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    frequencies = theta ** -(np.arange(factors.size) / factors.size)
    blend = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    wanted = 1.0 / ((1.0 - blend) / factor + blend)
    if not np.allclose(factors, wanted, rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
