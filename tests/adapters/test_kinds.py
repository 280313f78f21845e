from typing import Any

import pytest

from peftserve.adapters.formats import detect_kind
from peftserve.errors import InvalidAdapterError
from peftserve.types import AdapterKind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"peft_type": "LORA"}, AdapterKind.LORA),
        ({"peft_type": "PREFIX_TUNING"}, AdapterKind.PREFIX),
        ({"peft_type": "PROMPT_TUNING"}, AdapterKind.PREFIX),
        ({"peft_type": "P_TUNING"}, AdapterKind.PREFIX),
        ({"config": {"mh_adapter": True}}, AdapterKind.BOTTLENECK),
        ({"config": {"architecture": None}}, AdapterKind.BOTTLENECK),
    ],
)
def test_detects(config: dict[str, Any], kind: AdapterKind) -> None:
    assert detect_kind(config) is kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "config field peft_type: IA3 is not supported yet; served are LoRA"),
        ({"peft_type": "lora"}, "config field peft_type: 'lora' is no method known here"),
        ({"peft_type": ["LORA"]}, 'config field peft_type: ["LORA"] is no method known here'),
        ({"peft_type": None}, "config field peft_type: null is no method known here"),
        (
            {"config": {"architecture": "lora"}},
            "config field config.architecture: AdapterHub's 'lora' is not supported yet",
        ),
        ({"config": "pfeiffer"}, "config field config: 'pfeiffer' only names a configuration"),
        ({"hidden_size": 64}, "the config is no adapter_config.json: it has neither peft_type (PEFT) nor config"),
    ],
)
def test_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        detect_kind(config)
    assert caught.value.faults[0].startswith(message)


def test_every_method_of_peft_is_known_by_name() -> None:
    from peft import PeftType

    for method in PeftType:
        if method not in (PeftType.LORA, PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            with pytest.raises(InvalidAdapterError, match="not supported yet"):
                detect_kind({"peft_type": method.value})
