"""Prompt tuning and P-tuning as PEFT saves them: one tensor `prompt_embeddings` [n, hidden], of virtual tokens.

They come before the embeddings of the real ones. P-tuning's encoder has been applied in the saved file already
(`get_prompt_embedding_to_save`).
"""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.formats import fields, virtual_tokens
from peftserve.adapters.formats.parsed import PromptAdapter
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec

HONOURED = virtual_tokens.HONOURED
HARMLESS = virtual_tokens.HARMLESS | {
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
REFUSED = virtual_tokens.REFUSED


def parse(config: Mapping[str, Any], tensors: Mapping[str, TensorView], spec: ModelSpec) -> PromptAdapter:
    """The prompt in these files; raises `InvalidAdapterError` with all faults."""
    count, embeddings = virtual_tokens.read(
        config,
        tensors,
        spec,
        method="prompt",
        harmless=HARMLESS,
        heads=(spec.num_heads, "heads"),
        token_dim=(spec.hidden_size, "hidden size"),
        columns=(spec.hidden_size, f"the hidden size of {fields.describe(spec)}"),
    )
    return PromptAdapter(count, spec.num_layers, str(config["peft_type"]), embeddings)
