"""What kind of adapter a config describes."""

from collections.abc import Mapping
from typing import Any

from peftserve.adapters.faults import quote, refusal
from peftserve.adapters.formats.fields import show
from peftserve.types import AdapterKind

_SERVED = {
    "LORA": AdapterKind.LORA,
    "PREFIX_TUNING": AdapterKind.PREFIX,
    "PROMPT_TUNING": AdapterKind.PREFIX,
    "P_TUNING": AdapterKind.PREFIX,
}

_OTHER_PEFT_TYPES = frozenset(
    {
        "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT",
        "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA",
        "LOKR", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PSOFT",
        "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA",
        "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA",
    }
)  # fmt: skip
"""The other methods of PEFT 0.21 (`utils.peft_types.PeftType`), to tell an unsupported one from an unknown one."""

_SUPPORTED = "served are LoRA, prefix, prompt and P-tuning from PEFT, and bottleneck adapters from AdapterHub"


def detect_kind(config: Mapping[str, Any]) -> AdapterKind:
    """LORA, PREFIX or BOTTLENECK; raises `InvalidAdapterError` for every other config."""
    if "peft_type" in config:
        peft_type = config["peft_type"]
        if isinstance(peft_type, str) and peft_type in _SERVED:
            return _SERVED[peft_type]
        if isinstance(peft_type, str) and peft_type in _OTHER_PEFT_TYPES:
            raise refusal(f"config field peft_type: {peft_type} is not supported yet; {_SUPPORTED}")
        raise refusal(f"config field peft_type: {show(peft_type)} is no method known here; {_SUPPORTED}")
    inner = config.get("config")
    if isinstance(inner, dict):
        architecture = inner.get("architecture")
        if architecture is None:
            return AdapterKind.BOTTLENECK
        raise refusal(
            f"config field config.architecture: AdapterHub's {show(architecture)} is not supported yet; {_SUPPORTED}"
        )
    if isinstance(inner, str):
        raise refusal(
            f"config field config: {quote(inner)} only names a configuration; save it with AdapterHub's save_adapter"
        )
    raise refusal(
        f"the config is no adapter_config.json: it has neither peft_type (PEFT) nor config (AdapterHub); {_SUPPORTED}"
    )
