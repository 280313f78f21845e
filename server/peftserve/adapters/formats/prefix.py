"""Prefix tuning as PEFT saves it: one tensor `prompt_embeddings` [n, layers * 2 * kv_heads * head_dim].

Per virtual token and layer K, then V (`peft_model.PeftModel.get_prompt`). With `prefix_projection` the projection has
been applied in the saved file already (`get_prompt_embedding_to_save`). With grouped-query attention PEFT sets
`num_attention_heads` to the KV heads and `token_dim` to kv_heads * head_dim (`_prepare_prompt_learning_config`).
"""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.faults import FaultList
from peftserve.adapters.formats import fields
from peftserve.adapters.formats.parsed import PrefixAdapter
from peftserve.adapters.formats.tensors import TensorTable
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec

HONOURED = frozenset(
    {
        "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "peft_type",
        "task_type", "token_dim",
    }
)  # fmt: skip
HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "inference_mode", "init_weights",
        "peft_version", "prefix_projection", "revision",
    }
)  # fmt: skip
REFUSED = {
    "modules_to_save": "fully trained modules are not supported: they replace weights of the shared base model",
}


def parse(config: Mapping[str, Any], tensors: Mapping[str, TensorView], spec: ModelSpec) -> PrefixAdapter:
    """The prefix in these files; raises `InvalidAdapterError` with all faults."""
    faults = FaultList()
    fields.refuse_fields(config, HONOURED | HARMLESS, REFUSED, faults)
    if config.get("task_type") not in ("CAUSAL_LM", None):
        faults.add(
            f"config field task_type ({fields.show(config['task_type'])}): only CAUSAL_LM adapters generate text"
        )
    if config.get("num_transformer_submodules") not in (1, None):
        faults.add("config field num_transformer_submodules: must be 1; encoder-decoder prefixes do not fit this base")
    _check_size(config, "num_layers", spec.num_layers, "layers", spec, faults)
    _check_size(config, "num_attention_heads", spec.num_kv_heads, "KV heads", spec, faults)
    _check_size(config, "token_dim", spec.kv_size, "KV heads times head size", spec, faults)

    n = fields.count(config, "num_virtual_tokens", faults)
    if n is not None and n >= spec.max_position_embeddings:
        faults.add(
            f"config field num_virtual_tokens: {n} tokens leave no room in the base's context of "
            f"{spec.max_position_embeddings}"
        )
    table = TensorTable(tensors, faults)
    width = 2 * spec.num_layers * spec.kv_size
    embeddings = table.take(
        "prompt_embeddings",
        (n, width),
        f"{n} virtual tokens by K and V, {spec.kv_size} wide each, of the layers of {fields.describe(spec)}",
    )
    table.refuse_rest(lambda _: "a prefix file holds prompt_embeddings only")
    if faults or n is None or embeddings is None:
        raise faults.error()
    return PrefixAdapter(n, spec.num_layers, spec.num_kv_heads, spec.head_dim, embeddings)


def _check_size(
    config: Mapping[str, Any], field: str, expected: int, meaning: str, spec: ModelSpec, faults: FaultList
) -> None:
    value = config.get(field)
    if value is not None and (value != expected or not fields.is_whole(value)):
        faults.add(
            f"config field {field}: {fields.show(value)}, expected {expected} ({meaning} of {fields.describe(spec)})"
        )
