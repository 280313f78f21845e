"""Bottleneck adapters against AdapterHub's goldens (see tests/goldens/bottleneck/README.md)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.goldens.bottleneck.random_adapter import write_random_adapter
from tests.model.driver import Driver, Job, Placed
from tests.model.parity import Expected, assert_parity

GOLDENS = Path(__file__).parents[1] / "goldens" / "bottleneck"
TINY: dict[str, Any] = json.loads((GOLDENS / "tiny.json").read_text())
SMOLLM2: dict[str, Any] = json.loads((GOLDENS / "smollm2.json").read_text())


def jobs_of(entry: dict[str, Any], adapter: Placed | None) -> list[tuple[Job, Expected]]:
    return [
        (
            Job(case["prompt"], num_tokens=len(case["tokens"]), adapter=adapter, chunks=(3, 1, 5)),
            Expected(case["tokens"], case["top_ids"], case["top_logprobs"]),
        )
        for case in entry["cases"]
    ]


def check(driver: Driver, pairs: list[tuple[Job, Expected]]) -> None:
    driver.run(*(job for job, _ in pairs))
    for job, expected in pairs:
        assert_parity(job.sampled, expected)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(GOLDENS / TINY["base"], store=tmp_path / "store", max_rank=256)
    yield driver
    driver.close()


@pytest.mark.parametrize("entry", TINY["adapters"], ids=lambda entry: str(entry["folder"]).removeprefix("tiny/"))
def test_tiny_alone(tiny: Driver, entry: dict[str, Any]) -> None:
    adapter = tiny.add(GOLDENS / entry["folder"]) if entry["folder"] else None
    for job, expected in jobs_of(entry, adapter):
        check(tiny, [(job, expected)])


def test_tiny_all_in_one_batch(tiny: Driver) -> None:
    pairs = []
    for entry in TINY["adapters"]:
        pairs += jobs_of(entry, tiny.add(GOLDENS / entry["folder"]) if entry["folder"] else None)
    assert len(pairs) == 36
    check(tiny, pairs)


@pytest.mark.slow
def test_smollm2_all_in_one_batch(smollm2: Path, tmp_path: Path) -> None:
    driver = Driver(smollm2, page_size=16, store=tmp_path / "store", max_rank=256)
    pairs = []
    for index, entry in enumerate(SMOLLM2["adapters"]):
        adapter = None
        if entry["adapter"]:
            folder = tmp_path / f"adapter-{index}"
            assert write_random_adapter(folder, **entry["adapter"]) == entry["weights_sha256"]
            adapter = driver.add(folder)
        pairs += jobs_of(entry, adapter)
    check(driver, pairs)
    driver.close()
