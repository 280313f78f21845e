"""What the store writes down about an adapter: kind, digest and a summary for people."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from peftserve.adapters import formats, strict_json
from peftserve.adapters.faults import refusal
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec
from peftserve.types import AdapterKind, AdapterRef

MAX_CONFIG_BYTES = 1 << 20
_MAX_BASE_NAME_CHARS = 500


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True):
    """One validated adapter, whatever its name. `size_bytes` counts config and weights."""

    digest: str
    kind: AdapterKind
    size_bytes: int
    base_model_name: str | None
    details: dict[str, Any]


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a named adapter.

    `created_at`: when this version was published, seconds since the epoch. `base_model_name`: what the config says it
    was trained on. `details`: what there is to know of its kind, e.g. rank and target modules, or virtual tokens.
    """

    tenant: str
    name: str
    kind: AdapterKind
    digest: str
    pinned: bool
    created_at: float
    size_bytes: int
    base_model_name: str | None
    details: dict[str, Any]

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(digest=self.digest, kind=self.kind, name=self.name, tenant=self.tenant)


def read_config(data: bytes) -> dict[str, Any]:
    """The `adapter_config.json` in `data`, keys in file order; raises `InvalidAdapterError`."""
    if len(data) > MAX_CONFIG_BYTES:
        raise refusal(f"the config has {len(data)} bytes, the limit is {MAX_CONFIG_BYTES}")
    try:
        return strict_json.parse_object(data)
    except ValueError as error:
        raise refusal(f"the config (adapter_config.json) is broken: {error}") from None


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """The config without insignificant white space. Keys keep their order: PEFT's `rank_pattern` depends on it."""
    try:
        return json.dumps(config, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise refusal("the config (adapter_config.json) is broken: it holds half of a surrogate pair") from None


def digest_of(config_sha256: str, weights_sha256: str) -> str:
    """The identity of an adapter: sha256 over the sha256 (hex) of its canonical config and of its weights file."""
    return hashlib.sha256(f"peftserve-adapter-v1\n{config_sha256}\n{weights_sha256}\n".encode()).hexdigest()


def inspect(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorView],
    spec: ModelSpec,
    *,
    max_rank: int,
    digest: str,
    size_bytes: int,
) -> AdapterManifest:
    """Validate the adapter whole and sum it up; raises `InvalidAdapterError` with all faults."""
    adapter = formats.parse(config, tensors, spec, max_rank)
    details = adapter.details()
    if adapter.kind is AdapterKind.LORA:
        details |= {"alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora"))}
    base = config.get("base_model_name_or_path") or config.get("model_name")
    return AdapterManifest(
        digest=digest,
        kind=adapter.kind,
        size_bytes=size_bytes,
        base_model_name=base[:_MAX_BASE_NAME_CHARS] if isinstance(base, str) else None,
        details=details,
    )
