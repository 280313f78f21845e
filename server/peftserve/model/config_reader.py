"""config.json -> `ModelSpec`. Reads JSON only, no torch and no transformers: the front end uses it too.

Defaults of absent keys are those of the family's configuration class in transformers; spellings of transformers 4 and 5
are both read. What the decoder does not implement is refused, all faults at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from peftserve.errors import ConfigurationError, UnsupportedModelError
from peftserve.model.quantization_config import quantization_faults
from peftserve.model.spec import ModelSpec, RopeScaling
from peftserve.model.stop_tokens import read_stop_token_ids

NF4_BLOCK = 64
"""Input widths of NF4 layers are multiples of this."""

SUPPORTED = (
    "llama (Llama 2 and 3, SmolLM2), smollm3, mistral, qwen2 and qwen3 decoders with SiLU, "
    "no RoPE scaling or linear or llama3, in bf16, fp16, fp32 or bitsandbytes NF4"
)


@dataclass(frozen=True, slots=True)
class _Family:
    """Defaults of a family, from its configuration class in transformers."""

    qkv_bias: bool | None = None  # None: `attention_bias` decides, for q, k, v and o alike
    mlp_bias: bool = False  # whether `mlp_bias` is honoured
    qk_norm: bool = False
    tied: bool = False
    rope_theta: float = 10_000.0
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(mlp_bias=True),
    "smollm3": _Family(mlp_bias=True, tied=True, rope_theta=2_000_000.0, defaults={"num_key_value_heads": 4}),
    "mistral": _Family(qkv_bias=False, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _Family(qkv_bias=True, defaults={"num_key_value_heads": 32, "sliding_window": 4096}),
    "qwen3": _Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096}),
}

# Keys that change the maths in models derived from these families; none of the families above has them.
_FOREIGN_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "clip_qkv",
)


def read_spec(folder: Path) -> ModelSpec:
    """The model that the checkpoint in `folder` holds.

    Raises `UnsupportedModelError` with every fault found, `ConfigurationError` when there is no readable config.json.
    """
    path = folder / "config.json"
    spec = parse_config(read_json(path), where=str(path))
    return msgspec.structs.replace(spec, stop_token_ids=read_stop_token_ids(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `ConfigurationError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not a JSON object: {error}") from error


def parse_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """A `ModelSpec` without stop tokens from a configuration. Raises `UnsupportedModelError` with every fault found."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        faults = [f"model_type {model_type!r} is not implemented", *_foreign_faults(config)]
        raise _unsupported(where, faults)
    reader = _Reader(config, model_type)
    spec = reader.spec()
    if reader.faults:
        raise _unsupported(where, reader.faults)
    return spec


def _unsupported(where: str, faults: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: {'; '.join(faults)}. Supported: {SUPPORTED}", faults=faults)


def _foreign_faults(config: Mapping[str, Any]) -> list[str]:
    return [f"{key} {config[key]!r} is not implemented" for key in _FOREIGN_KEYS if config.get(key)]


class _Reader:
    """One configuration being read: values by key, faults gathered on the way (a faulty value reads as 1)."""

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        self.model_type = model_type
        self.family = _FAMILIES[model_type]
        self.config = {**self.family.defaults, **config}
        self.faults: list[str] = []

    def spec(self) -> ModelSpec:
        self.faults += _foreign_faults(self.config)
        self.faults += quantization_faults(self.config)
        if self.config.get("hidden_act", "silu") not in ("silu", "swish"):
            self.faults.append(f"hidden_act {self.config['hidden_act']!r} is not implemented")
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        head_dim = self.size("head_dim", max(1, hidden // heads))
        intermediate, layers = self.size("intermediate_size"), self.size("num_hidden_layers")
        self._check_shapes(hidden, heads, kv_heads, head_dim, intermediate)
        theta, scaling = self._rope()
        nope = self._nope_layers(layers)
        window, sliding = self._sliding(layers, nope)
        bias = self.flag("attention_bias") if self.family.qkv_bias is None else self.family.qkv_bias
        return ModelSpec(
            name=self.model_type,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.size("vocab_size"),
            max_position_embeddings=self.size("max_position_embeddings"),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=self.flag("tie_word_embeddings", self.family.tied),
            attention_bias=bias,
            attention_out_bias=bias and self.family.qkv_bias is None,
            mlp_bias=self.family.mlp_bias and self.flag("mlp_bias"),
            qk_norm=self.family.qk_norm,
            sliding_window=window,
            sliding_layers=sliding,
            nope_layers=nope,
            bos_token_id=self._token("bos_token_id"),
        )

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; null and absent are `default`."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.faults.append(f"{key} is missing")
        elif type(value) is not int or value < 1:
            self.faults.append(f"{key} {value!r} is not a positive integer")
        else:
            return value
        return 1

    def number(self, key: str, default: float, values: Mapping[str, Any] | None = None) -> float:
        """A positive number."""
        value = (self.config if values is None else values).get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.faults.append(f"{key} {value!r} is not a positive number")
            return 1.0
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.faults.append(f"{key} {value!r} is not true or false")
        return default if value is None else bool(value)

    def _token(self, key: str) -> int | None:
        value = self.config.get(key)
        return value if type(value) is int else None

    def _check_shapes(self, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> None:
        if self.faults:
            return  # the values below may be stand-ins
        if heads % kv_heads:
            self.faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            self.faults.append(f"head_dim {head_dim} is odd")
        for name, width in (
            ("hidden_size", hidden),
            ("intermediate_size", intermediate),
            ("num_attention_heads * head_dim", heads * head_dim),
        ):
            if width % NF4_BLOCK:
                self.faults.append(f"{name} {width} is not a multiple of {NF4_BLOCK}, the NF4 block")

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """theta and scaling: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
        parameters = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = self.number("rope_theta", self.number("rope_theta", self.family.rope_theta), _mapping(parameters))
        if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
            self.faults.append("RoPE parameters that differ by layer type are not implemented")
            return theta, None
        partial = parameters.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            self.faults.append(f"partial_rotary_factor {partial!r} is not implemented")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind not in ("linear", "llama3"):
            self.faults.append(f"RoPE scaling {kind!r} is not implemented")
            return theta, None
        required = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
        self.faults += [f"RoPE scaling {kind!r} needs {key}" for key in required if parameters.get(key) is None]
        original = parameters.get("original_max_position_embeddings") or self.config.get("max_position_embeddings")
        return theta, RopeScaling(
            kind=kind,
            factor=self.number("factor", 1.0, parameters),
            low_freq_factor=self.number("low_freq_factor", 1.0, parameters),
            high_freq_factor=self.number("high_freq_factor", 4.0, parameters),
            original_max_position_embeddings=original if type(original) is int else 8192,
        )

    def _nope_layers(self, layers: int) -> tuple[int, ...]:
        """SmolLM3: `no_rope_layers` holds a 0 for each layer without RoPE; by default every fourth."""
        if self.model_type != "smollm3":
            return ()
        marks = self.config.get("no_rope_layers")
        if marks is None:
            interval = self.size("no_rope_layer_interval", 4)
            return tuple(layer for layer in range(layers) if (layer + 1) % interval == 0)
        if not isinstance(marks, list) or len(marks) < layers:
            self.faults.append(f"no_rope_layers must list at least num_hidden_layers = {layers} marks")
            return ()
        return tuple(layer for layer in range(layers) if not marks[layer])

    def _sliding(self, layers: int, nope: tuple[int, ...]) -> tuple[int | None, tuple[bool, ...]]:
        """The window in tokens, and which layers it bounds (empty: all of them)."""
        types = self.config.get("layer_types")
        if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
            self.faults.append(f"layer_types {types!r} is not a list of names")
            types = None
        if self.config.get("sliding_window") is None:
            window = None
        elif self.model_type == "llama":
            self.faults.append("sliding_window is not part of the llama architecture")
            window = None
        else:
            window = self.size("sliding_window")
        if self.model_type == "mistral":
            if types is not None and len(set(types)) > 1:
                self.faults.append("layer_types that mix kinds of attention are not implemented for mistral")
            return window, ()
        if window is None or not self.flag("use_sliding_window"):
            return None, ()
        if types is not None:
            unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
            self.faults += [f"layer_types {kind!r} is not implemented" for kind in unknown]
            if len(types) != layers:
                self.faults.append(f"layer_types must list num_hidden_layers = {layers} kinds")
            sliding = tuple(kind == "sliding_attention" for kind in types)
        elif self.model_type == "smollm3":
            sliding = tuple(layer in nope for layer in range(layers))
        else:
            first = self.config.get("max_window_layers")
            sliding = tuple(layer >= (first if type(first) is int else 28) for layer in range(layers))
        if not any(sliding):
            return None, ()
        return window, () if all(sliding) else sliding


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
