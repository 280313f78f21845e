"""The three adapter kinds behind one interface, as trained: attach a new or a saved one to a dense base, save it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase

from peftserve.demo.bottleneck_module import BottleneckAdapters
from peftserve.demo.tasks import Task

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SAVED_DTYPE = torch.bfloat16

LORA_RANK = 8
LORA_TARGETS = ("q_proj", "v_proj")
PREFIX_TOKENS = 16
BOTTLENECK_REDUCTION = 32


@dataclass(frozen=True)
class Attached:
    """A base model with at most one adapter in it.

    Attributes:
        model: the transformers model, whose forward pass now goes through the adapter.
        adapter: what is trained and saved; ``None`` for the bare base.
        start_cache: makes the KV cache that a batch of the given size starts from. A prefix fills it; the model then
            counts the positions of real tokens from the prefix's length.
    """

    model: LlamaForCausalLM
    adapter: nn.Module | None = None
    start_cache: Callable[[int], DynamicCache] = lambda _batch_size: DynamicCache()

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's trainable parameters."""
        return [p for p in self.adapter.parameters() if p.requires_grad] if self.adapter else []

    def save(self, folder: Path) -> None:
        """Write the adapter to ``folder`` in its public format, weights in ``SAVED_DTYPE``."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.adapter, BottleneckAdapters):
            self.adapter.save(folder, BASE_NAME, SAVED_DTYPE)
        elif isinstance(self.adapter, PeftModel):
            config = self.adapter.active_peft_config
            config.base_model_name_or_path = BASE_NAME
            config.inference_mode = True
            weights = get_peft_model_state_dict(self.adapter, save_embedding_layers=False)
            save_file(
                {key: value.to(SAVED_DTYPE).contiguous() for key, value in weights.items()},
                folder / SAFETENSORS_WEIGHTS_NAME,
                metadata={"format": "pt"},
            )
            config.save_pretrained(str(folder))


def attach_new(task: Task, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Attached:
    """Attach an untrained adapter of the task's kind; the base's own weights are frozen."""
    model.requires_grad_(False)
    if task.kind == "bottleneck":
        return Attached(model, BottleneckAdapters(model, task.name, BOTTLENECK_REDUCTION))
    if task.kind == "lora":
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(LORA_TARGETS)
        )
        return _attached_peft(model, get_peft_model(model, lora))
    prefix = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PREFIX_TOKENS)
    peft_model = get_peft_model(model, prefix)
    # From the K/V of real text a prefix learns in hundreds of steps, from noise it needs thousands.
    initialize_kv_prefix_from_text(peft_model, tokenizer, text=task.instruction)
    return _attached_peft(model, peft_model)


def attach_saved(task: Task, model: LlamaForCausalLM, folder: Path) -> Attached:
    """Attach the adapter that ``Attached.save`` wrote to ``folder``, for evaluation."""
    if task.kind == "bottleneck":
        return Attached(model, BottleneckAdapters.load(model, folder))
    return _attached_peft(model, PeftModel.from_pretrained(model, str(folder)))


def _attached_peft(model: LlamaForCausalLM, peft_model: PeftModel) -> Attached:
    if not isinstance(peft_model.active_peft_config, PrefixTuningConfig):
        return Attached(model, peft_model)
    return Attached(model, peft_model, lambda size: cast("DynamicCache", peft_model.get_prompt(size)))
