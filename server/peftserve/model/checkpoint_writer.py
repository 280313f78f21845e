"""Writing an NF4 checkpoint that transformers, bitsandbytes and this server all read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from peftserve.model import nf4_format
from peftserve.model.checkpoint import INDEX_FILE, SINGLE_FILE
from peftserve.model.layout import expected_tensors
from peftserve.model.spec import ModelSpec

QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}
"""What transformers' `BitsAndBytesConfig` writes into config.json for such a checkpoint."""

_SHARD_BYTES = 2 << 30


class TensorSource(Protocol):
    """Full-precision weights by their Hugging Face names."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""


class _Shards:
    """Gathers tensors and writes them out whenever `shard_bytes` are full, so that memory stays bounded."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep `tensors` in one shard. Only tensors that stand together may be added together."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += size

    def _flush(self) -> None:
        path = self._folder / f"part-{len(self._written)}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write the rest, and give the files the names transformers expects."""
        self._flush()
        count = len(self._written)
        if count == 1:
            (self._folder / "part-0.safetensors").rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"part-{number}.safetensors").rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=1))


def write_nf4_checkpoint(
    source: TensorSource,
    spec: ModelSpec,
    config: Mapping[str, Any],
    folder: Path,
    *,
    on_tensor: Callable[[int, int], None] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Quantise the projections of `source` into `folder`, keep everything else as it comes, and write config.json.

    `config` is the model's own configuration, without quantisation. `on_tensor(done, total)` reports progress. Peak
    memory is one shard plus one full-precision tensor.
    """
    shards = _Shards(folder, shard_bytes)
    expected = expected_tensors(spec)
    for done, (name, info) in enumerate(expected.items(), start=1):
        tensor = source.read(name)
        if info.quantized:
            parts = nf4_format.quantize(tensor)
            shards.add({f"{name}.{suffix}" if suffix else name: part for suffix, part in parts.items()})
        else:
            shards.add({name: tensor.contiguous()})
        if on_tensor is not None:
            on_tensor(done, len(expected))
    shards.close()
    full = {**config, "quantization_config": QUANTIZATION_CONFIG}
    (folder / "config.json").write_text(json.dumps(full, indent=2) + "\n")
