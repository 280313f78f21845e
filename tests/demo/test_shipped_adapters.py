"""The adapters that are kept in the repository: complete, small, finite, and free of machine paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftserve.demo
from peftserve.demo.tasks import TASKS

FOLDER = Path(peftserve.demo.__file__).parent / "adapters"
WEIGHTS_FILE = {
    "lora": "adapter_model.safetensors",
    "prefix": "adapter_model.safetensors",
    "bottleneck": "adapter.safetensors",
}
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYERS, HIDDEN, KV_WIDTH = 30, 576, 3 * 64


@pytest.mark.parametrize("name", TASKS)
def test_folder_holds_configuration_and_weights_only(name: str) -> None:
    files = {path.name for path in (FOLDER / name).iterdir()}
    assert files == {"adapter_config.json", WEIGHTS_FILE[TASKS[name].kind]}


@pytest.mark.parametrize("name", TASKS)
def test_weights_are_finite_bf16(name: str) -> None:
    weights = load_file(FOLDER / name / WEIGHTS_FILE[TASKS[name].kind])
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_all_adapters_together_stay_below_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 4_000_000


@pytest.mark.parametrize("name", TASKS)
def test_configuration_names_the_public_base(name: str) -> None:
    config = json.loads((FOLDER / name / "adapter_config.json").read_text(encoding="utf-8"))
    assert BASE_NAME in (config.get("base_model_name_or_path"), config.get("model_name"))


def test_shapes_follow_from_the_configurations() -> None:
    lora = load_file(FOLDER / "order-yaml" / WEIGHTS_FILE["lora"])
    config = json.loads((FOLDER / "order-yaml" / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(lora) == LAYERS * 2 * len(config["target_modules"])
    assert {min(tensor.shape) for tensor in lora.values()} == {config["r"]}

    prefix = load_file(FOLDER / "ticket-router" / WEIGHTS_FILE["prefix"])
    config = json.loads((FOLDER / "ticket-router" / "adapter_config.json").read_text(encoding="utf-8"))
    shapes = {key: tuple(tensor.shape) for key, tensor in prefix.items()}
    assert shapes == {"prompt_embeddings": (config["num_virtual_tokens"], LAYERS * 2 * KV_WIDTH)}

    bottleneck = load_file(FOLDER / "iso-date" / WEIGHTS_FILE["bottleneck"])
    config = json.loads((FOLDER / "iso-date" / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(bottleneck) == LAYERS * 4
    size = HIDDEN // config["config"]["reduction_factor"]
    shapes_per_layer = {(size, HIDDEN), (HIDDEN, size), (size,), (HIDDEN,)}
    assert {tuple(tensor.shape) for tensor in bottleneck.values()} == shapes_per_layer
