"""Prefix tuning as PEFT saves it: one tensor `prompt_embeddings` [n, layers * 2 * kv_heads * head_dim].

Per virtual token and layer K, then V (`peft_model.PeftModel.get_prompt`). With `prefix_projection` the projection has
been applied in the saved file already (`get_prompt_embedding_to_save`). With grouped-query attention PEFT sets
`num_attention_heads` to the KV heads and `token_dim` to kv_heads * head_dim (`_prepare_prompt_learning_config`).
"""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.formats import fields, virtual_tokens
from peftserve.adapters.formats.parsed import PrefixAdapter
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec

HONOURED = virtual_tokens.HONOURED
HARMLESS = virtual_tokens.HARMLESS | {"encoder_hidden_size", "init_weights", "prefix_projection"}
REFUSED = virtual_tokens.REFUSED


def parse(config: Mapping[str, Any], tensors: Mapping[str, TensorView], spec: ModelSpec) -> PrefixAdapter:
    """The prefix in these files; raises `InvalidAdapterError` with all faults."""
    base = fields.describe(spec)
    count, embeddings = virtual_tokens.read(
        config,
        tensors,
        spec,
        method="prefix",
        harmless=HARMLESS,
        heads=(spec.num_kv_heads, "KV heads"),
        token_dim=(spec.kv_size, "KV heads times head size"),
        columns=(
            2 * spec.num_layers * spec.kv_size,
            f"K and V, {spec.kv_size} wide each, of the layers of {base}",
        ),
    )
    return PrefixAdapter(count, spec.num_layers, spec.num_kv_heads, spec.head_dim, embeddings)
