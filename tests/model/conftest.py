"""The embedded model, where it has been prepared; a tiny one with an adapter of every kind."""

import os
from pathlib import Path
from typing import Any

import pytest

from peftserve.config import EngineConfig
from peftserve.model.config_reader import read_spec
from peftserve.model.prepare import find_prepared
from tests import tiny_models
from tests.goldens.bottleneck.random_adapter import write_random_adapter


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The prepared NF4 checkpoint in `PEFTSERVE_TEST_DATA_DIR`, else in the default data folder."""
    config = EngineConfig()
    data_dir = Path(os.environ.get("PEFTSERVE_TEST_DATA_DIR") or config.data_dir).expanduser()
    folder = find_prepared(config.model, data_dir)
    if folder is None:
        pytest.skip(f"{config.model} is not prepared in {data_dir}: run `peftserve model pull`")
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with biases."""
    return tiny_models.make_checkpoint("llama_bias", tmp_path_factory.mktemp("base") / "llama", seed=1)


@pytest.fixture(scope="session")
def every_kind(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters for it: a LoRA on attention, one of three rank pages on everything, a DoRA, a prefix, a prompt, and a
    Houlsby bottleneck."""
    from tests.model import oracle

    base: Any = oracle.load_base(base_folder)
    root = tmp_path_factory.mktemp("every-kind")
    spec = read_spec(base_folder)
    write_random_adapter(
        root / "houlsby", kind="houlsby", hidden_size=spec.hidden_size, num_layers=spec.num_layers, seed=3, gain=0.3
    )
    return [
        oracle.save_lora(base, root / "lora-3", rank=3, targets="attention", seed=1),
        oracle.save_lora(base, root / "lora-17", rank=17, targets="all", seed=2),
        oracle.save_lora(base, root / "dora-5", rank=5, targets="all", seed=3, dora=True),
        oracle.save_prefix(base, root / "prefix", num_tokens=6, seed=2),
        oracle.save_prompt(base, root / "prompt", num_tokens=7, seed=4),
        root / "houlsby",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama without biases."""
    return tiny_models.make_checkpoint("llama", tmp_path_factory.mktemp("llama"), seed=1)


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    """The same as the oracle has it."""
    from tests.model import oracle

    return oracle.load_base(folder)
