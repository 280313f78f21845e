"""Which `quantization_config` of a config.json the loader reads. Imports no torch."""

from collections.abc import Mapping
from typing import Any


def quantization_faults(config: Mapping[str, Any]) -> list[str]:
    """What about the checkpoint's quantisation is not supported, by name; empty for none and for bitsandbytes NF4."""
    settings = config.get("quantization_config")
    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        return ["quantization_config is not an object"]
    method = settings.get("quant_method", "bitsandbytes" if "bnb_4bit_quant_type" in settings else None)
    if method != "bitsandbytes":
        return [f"weights quantised with {method!r} are not supported, only bitsandbytes NF4"]
    if settings.get("load_in_8bit"):
        return ["weights quantised with bitsandbytes LLM.int8() (load_in_8bit) are not supported, only NF4"]
    kind = settings.get("bnb_4bit_quant_type", "fp4")  # the default of transformers' BitsAndBytesConfig
    if kind != "nf4":
        return [f"bnb_4bit_quant_type {kind!r} is not supported, only 'nf4'"]
    return []
