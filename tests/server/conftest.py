"""One server for most whole-server tests: a tiny NF4 Llama in fp32, with an adapter of every kind and its oracle."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peftserve_client import Client
from tests.model.parity import Expected
from tests.server.process import ServerProcess, running_server

GOLDENS = Path(__file__).parents[1] / "goldens" / "bottleneck"
TINY: dict[str, Any] = json.loads((GOLDENS / "tiny.json").read_text())


@dataclass(frozen=True, slots=True)
class Case:
    """A request with an oracle's answer. `adapter_id` None is the bare base."""

    adapter_id: str | None
    prompt: list[int]
    expected: Expected


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens' base, with a tokenizer (its ids beyond the base's vocabulary are never used)."""
    from tests.tiny_models import make_tokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    shutil.copytree(GOLDENS / TINY["base"], folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By adapter_id: LoRA and prefix as PEFT saves them, bottleneck as AdapterHub does."""
    from tests.model import oracle

    root = tmp_path_factory.mktemp("adapters")
    base = oracle.load_base(base_folder)
    folders = {
        f"lora-r{rank}": oracle.save_lora(base, root / f"lora-r{rank}", rank=rank, targets=targets, seed=rank)
        for rank, targets in ((1, "qv"), (4, "attention"), (8, "all"), (16, "qv"), (64, "all"))
    }
    folders["dora"] = oracle.save_lora(base, root / "dora", rank=8, targets="all", seed=9, dora=True)
    for length in (1, 20, 100):
        base = oracle.load_base(base_folder)
        folder = root / f"prefix-{length}"
        folders[folder.name] = oracle.save_prefix(base, folder, num_tokens=length, seed=length)
    for name, encoder in (("prompt", ""), ("p-tuning", "MLP")):
        base = oracle.load_base(base_folder)
        folders[name] = oracle.save_prompt(base, root / name, num_tokens=10, seed=7, encoder=encoder)
    for name in ("pfeiffer", "houlsby", "parallel"):
        folders[name] = GOLDENS / "tiny" / name
    return folders


@pytest.fixture(scope="session")
def cases(base_folder: Path, adapter_folders: dict[str, Path]) -> list[Case]:
    """Prompts for the base and every adapter, with what PEFT (LoRA, prefix) or AdapterHub (bottleneck) answer."""
    from tests.model import oracle

    found = [
        Case(
            Path(entry["folder"]).name if entry["folder"] else None,
            case["prompt"],
            Expected(case["tokens"], case["top_ids"], case["top_logprobs"]),
        )
        for entry in TINY["adapters"]
        if entry["folder"] is None or Path(entry["folder"]).name in adapter_folders
        for case in entry["cases"]
    ]
    prompts = sorted({tuple(case.prompt) for case in found}, key=len)
    for name, folder in adapter_folders.items():
        if name.startswith(("lora", "dora", "prefix", "prompt", "p-tuning")):
            with oracle.with_adapter(oracle.load_base(base_folder), folder) as model:
                for prompt in prompts:
                    found.append(Case(name, list(prompt), _greedy(oracle, model, list(prompt))))
    return found


def _greedy(oracle: Any, model: Any, prompt: list[int], steps: int = 12) -> Expected:
    tokens: list[int] = []
    for _ in range(steps):
        logits = oracle.continuation_logits(model, prompt, [*tokens, 0])
        tokens.append(int(logits[-1].argmax()))
    return oracle.judge(model, prompt, tokens)  # type: ignore[no-any-return]


@pytest.fixture(scope="package")
def server(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """fp32, small pages and a small token budget, so that every prompt is prefilled in chunks and pages are shared."""
    with running_server(
        base_folder,
        tmp_path_factory.mktemp("data"),
        dtype="float32",
        threads=1,
        page_size=4,
        max_batch_tokens=24,
        kv_cache_bytes="4MiB",
        adapter_device_bytes="4MiB",
        max_body_bytes="64KiB",
        max_adapter_bytes="1MiB",
    ) as process:
        yield process


@pytest.fixture(scope="package")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.http) as http:
        yield http


@pytest.fixture(scope="package")
def uploaded(client: Client, adapter_folders: dict[str, Path]) -> list[str]:
    """Every adapter, uploaded to the running server."""
    for name, folder in adapter_folders.items():
        client.adapters.push(name, folder)
    return list(adapter_folders)
