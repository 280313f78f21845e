"""Virtual tokens as PEFT saves them, as keys and values or as input embeddings: one tensor `prompt_embeddings`."""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.faults import FaultList
from peftserve.adapters.formats import fields
from peftserve.adapters.formats.tensors import TensorTable
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec

HONOURED = frozenset(
    {
        "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "peft_type",
        "task_type", "token_dim",
    }
)  # fmt: skip
HARMLESS = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})
REFUSED = {
    "modules_to_save": "fully trained modules are not supported: they replace weights of the shared base model",
}


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorView],
    spec: ModelSpec,
    *,
    method: str,
    harmless: frozenset[str],
    heads: tuple[int, str],
    token_dim: tuple[int, str],
    columns: tuple[int, str],
) -> tuple[int, TensorView]:
    """How many virtual tokens there are, and the tensor [n, columns]; raises `InvalidAdapterError` with all faults.

    `harmless`: all fields of this `method` that change nothing; `heads`, `token_dim` and `columns`: what the base has
    there, and what that is.
    """
    faults = FaultList()
    count = _read_config(config, spec, faults, harmless=harmless, heads=heads, token_dim=token_dim)
    table = TensorTable(tensors, faults)
    width, meaning = columns
    embeddings = table.take("prompt_embeddings", (count, width), f"{count} virtual tokens by {meaning}")
    table.refuse_rest(lambda _: f"a {method} file holds prompt_embeddings only")
    if faults or count is None or embeddings is None:
        raise faults.error()
    return count, embeddings


def _read_config(
    config: Mapping[str, Any],
    spec: ModelSpec,
    faults: FaultList,
    *,
    harmless: frozenset[str],
    heads: tuple[int, str],
    token_dim: tuple[int, str],
) -> int | None:
    """How many virtual tokens there are; None after adding a fault. Checks all other fields, too."""
    fields.refuse_fields(config, HONOURED | harmless, REFUSED, faults)
    if config.get("task_type") not in ("CAUSAL_LM", None):
        faults.add(
            f"config field task_type ({fields.show(config['task_type'])}): only CAUSAL_LM adapters generate text"
        )
    if config.get("num_transformer_submodules") not in (1, None):
        faults.add("config field num_transformer_submodules: must be 1; encoder-decoder prefixes do not fit this base")
    for field, (expected, meaning) in {
        "num_layers": (spec.num_layers, "layers"),
        "num_attention_heads": heads,
        "token_dim": token_dim,
    }.items():
        value = config.get(field)
        if value is not None and (value != expected or not fields.is_whole(value)):
            base = fields.describe(spec)
            faults.add(f"config field {field}: {fields.show(value)}, expected {expected} ({meaning} of {base})")
    count = fields.count(config, "num_virtual_tokens", faults)
    if count is not None and count >= spec.max_position_embeddings:
        faults.add(
            f"config field num_virtual_tokens: {count} tokens leave no room in the base's context of "
            f"{spec.max_position_embeddings}"
        )
    return count
