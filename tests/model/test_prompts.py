"""Prompt adapters become prefixes on a loader thread, beside the steps that run. What comes of it, test_parity_adapters
compares with PEFT."""

import threading
from pathlib import Path

import pytest
import torch

from peftserve.model.packing import PackedPrefix
from tests.model import oracle
from tests.model.driver import Driver, Job

# PEFT 0.21 reads a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def test_neither_the_steps_nor_the_prompt_notice_each_other(base_folder: Path, tmp_path: Path) -> None:
    base = oracle.load_base(base_folder)
    driver = Driver(base_folder, dtype=torch.bfloat16, page_size=8, store=tmp_path / "store")
    lora = driver.add(oracle.save_lora(base, tmp_path / "lora", rank=8, targets="all", seed=1))
    prompt = driver.publish(oracle.save_prompt(base, tmp_path / "prompt", num_tokens=300, seed=2))

    def load() -> PackedPrefix:
        weights = driver.memory.load(prompt).weights
        assert isinstance(weights, PackedPrefix)
        return weights

    def jobs() -> list[Job]:
        adapters = (None, lora, placed)
        return [Job(list(range(3, 90 + i)), 12, adapter=adapters[i % 3], chunks=(7, 30 + i)) for i in range(6)]

    placed = driver.place(driver.memory.load(prompt))
    first, expected = load(), jobs()
    driver.run(*expected)
    loaded: list[PackedPrefix] = []
    done = threading.Event()

    def keep_loading() -> None:
        while not done.is_set():
            loaded.append(load())

    loader = threading.Thread(target=keep_loading)
    loader.start()
    try:
        while len(loaded) < 5 and loader.is_alive():
            found = jobs()
            driver.run(*found)
            assert [job.sampled for job in found] == [job.sampled for job in expected]
    finally:
        done.set()
        loader.join()
        driver.close()
    assert len(loaded) >= 5
    assert all(torch.equal(other.k, first.k) and torch.equal(other.v, first.v) for other in loaded)
    assert first.num_tokens == 300
    assert first.k.any()
    assert not first.k[:, -1, :, 300 % 8 :].any(), "past the last token lies nothing"
