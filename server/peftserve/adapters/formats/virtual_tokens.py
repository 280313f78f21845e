"""What PEFT's configs of virtual tokens have in common, whether they hold keys and values or input embeddings."""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.faults import FaultList
from peftserve.adapters.formats import fields
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


def read_count(
    config: Mapping[str, Any],
    spec: ModelSpec,
    faults: FaultList,
    *,
    harmless: frozenset[str],
    heads: tuple[int, str],
    token_dim: tuple[int, str],
) -> int | None:
    """How many virtual tokens there are; None after adding a fault. Checks all other fields, too.

    `harmless`: all fields that change nothing; `heads` and `token_dim`: what the base has there, and what
    that is.
    """
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
