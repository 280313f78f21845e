"""The shape of a base model: what the decoder, the caches and adapter validation need to know. Imports no torch."""

from dataclasses import dataclass

import msgspec


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """RoPE scaling: `linear` (positions / factor) or `llama3` (Llama 3.1 frequency bands)."""

    kind: str  # "linear" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A Llama-family decoder. Sizes in elements, lengths in tokens.

    `name` is the family (`llama`, `mistral`, `qwen2`, `qwen3`, `smollm3`). Flags: `attention_bias` (q, k, v have
    biases), `attention_out_bias`, `mlp_bias`, `qk_norm` (RMS norm per head on q and k before RoPE, Qwen3),
    `sliding_window` (Mistral; None for full attention), `sliding_layers` (per layer; empty: every layer when a window
    is set), `nope_layers` (layers without RoPE, SmolLM3). `stop_token_ids`: the model's own end-of-sequence ids.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    nope_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    stop_token_ids: frozenset[int] = frozenset()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_page_bytes(self, page_size: int, element_bytes: int) -> int:
        """Bytes of one KV page over all layers, K and V."""
        return 2 * self.num_layers * self.kv_size * page_size * element_bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that a LoRA may change: its index in the adapter tables and its shape."""

    name: str
    index: int
    in_features: int
    out_features: int


TARGET_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def targets(spec: ModelSpec) -> tuple[Target, ...]:
    """The LoRA targets of one decoder layer, in table order."""
    h, q, kv, inter = spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size
    shapes = ((h, q), (h, kv), (h, kv), (q, h), (h, inter), (h, inter), (inter, h))
    return tuple(Target(n, i, *s) for i, (n, s) in enumerate(zip(TARGET_NAMES, shapes, strict=True)))
