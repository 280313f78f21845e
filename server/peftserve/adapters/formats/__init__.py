"""Readers of the public adapter formats: files in, one of `formats.parsed` out, or every fault by name."""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.formats import bottleneck, lora, prefix, prompt
from peftserve.adapters.formats.kinds import detect_kind
from peftserve.adapters.formats.parsed import (
    Activation,
    Adapter,
    BottleneckAdapter,
    BottleneckInput,
    BottleneckModule,
    BottleneckSite,
    LoraAdapter,
    LoraModule,
    PrefixAdapter,
    PromptAdapter,
)
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec
from peftserve.types import AdapterKind

__all__ = [
    "Activation",
    "Adapter",
    "BottleneckAdapter",
    "BottleneckInput",
    "BottleneckModule",
    "BottleneckSite",
    "LoraAdapter",
    "LoraModule",
    "PrefixAdapter",
    "PromptAdapter",
    "detect_kind",
    "parse",
]


def parse(config: Mapping[str, Any], tensors: Mapping[str, TensorView], spec: ModelSpec, max_rank: int) -> Adapter:
    """The adapter in an `adapter_config.json` and its tensors, checked whole against the base.

    `max_rank` bounds LoRA ranks and bottleneck widths. The result's tensors are views of `tensors`. Raises
    `InvalidAdapterError` with all faults.
    """
    kind = detect_kind(config)
    if kind is AdapterKind.LORA:
        return lora.parse(config, tensors, spec, max_rank)
    if kind is AdapterKind.PREFIX:
        reader = prefix.parse if config["peft_type"] == "PREFIX_TUNING" else prompt.parse
        return reader(config, tensors, spec)
    return bottleneck.parse(config, tensors, spec, max_rank)
