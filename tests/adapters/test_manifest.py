import hashlib
import json

import pytest
from safetensors.numpy import save

from peftserve.adapters import manifest, safetensors
from peftserve.errors import InvalidAdapterError
from peftserve.types import AdapterKind
from tests.adapters.files import SPEC, Arrays, bottleneck, lora, prefix


def inspect(config: dict[str, object], arrays: Arrays) -> manifest.AdapterManifest:
    return manifest.inspect(config, safetensors.read(save(arrays)), SPEC, max_rank=16, digest="0" * 64, size_bytes=7)


def test_canonical_config_drops_white_space_and_keeps_the_order() -> None:
    text = b'{ "b": 1.50,\n "a": [1, {"z": null, "y": "\xc3\xa9"}] }'
    canonical = manifest.canonical_config(manifest.read_config(text))
    assert canonical == b'{"b":1.5,"a":[1,{"z":null,"y":"\xc3\xa9"}]}'
    assert manifest.canonical_config(manifest.read_config(canonical)) == canonical


def test_digest_can_be_made_with_sha256sum() -> None:
    config, weights = hashlib.sha256(b"{}").hexdigest(), hashlib.sha256(b"w").hexdigest()
    text = f"peftserve-adapter-v1\n{config}\n{weights}\n"
    assert manifest.digest_of(config, weights) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" " * (manifest.MAX_CONFIG_BYTES + 1), "the config has 1048577 bytes, the limit is 1048576"),
        (b'{"r": 1, "r": 2}', "the config (adapter_config.json) is broken: the key 'r' appears twice"),
        (b"PK\x03\x04", "the config (adapter_config.json) is broken: not JSON"),
    ],
)
def test_broken_configs(data: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        manifest.read_config(data)
    assert caught.value.faults[0].startswith(message)


def test_half_a_surrogate_pair_cannot_be_stored() -> None:
    with pytest.raises(InvalidAdapterError, match="half of a surrogate pair"):
        manifest.canonical_config(manifest.read_config(json.dumps({"revision": "\ud800"}).encode()))


def test_inspect_sums_up_each_kind() -> None:
    found = inspect(*lora(base_model_name_or_path="org/base", lora_alpha=12, use_rslora=True))
    assert (found.kind, found.base_model_name, found.digest, found.size_bytes) == (
        AdapterKind.LORA,
        "org/base",
        "0" * 64,
        7,
    )
    assert found.details["alpha"] == 12
    assert found.details["rslora"] is True
    assert found.details["rank"] == 4
    assert inspect(*prefix()).details["num_virtual_tokens"] == 5
    config, arrays = bottleneck()
    found = inspect(config | {"model_name": "m" * 900}, arrays)
    assert found.kind is AdapterKind.BOTTLENECK
    assert found.base_model_name == "m" * 500
