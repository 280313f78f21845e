"""LoRA and prefix adapters against PEFT, and a batch of all kinds at once."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftserve_kernels.rank_pages import quantize_rows
from tests import tiny_models
from tests.goldens.bottleneck.random_adapter import write_random_adapter
from tests.model import oracle
from tests.model.driver import Driver, Job
from tests.model.parity import TOLERANCE, assert_parity, errors

# PEFT 0.21 reads a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

NUM_TOKENS = 8


def prompt(seed: int, length: int = 15) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_models.VOCAB_SIZE), k=length)


@pytest.fixture
def driver(folder: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(folder, page_size=8, store=tmp_path / "store", max_rank=64)
    yield driver
    driver.close()


def check(driver: Driver, base: Any, adapter_folder: Path, seed: int, tolerance: float = TOLERANCE) -> None:
    """Alone and in chunks, against PEFT; and that the adapter matters at all."""
    adapter = driver.add(adapter_folder)
    whole = Job(prompt(seed), NUM_TOKENS, adapter=adapter)
    chunked = Job(prompt(seed), NUM_TOKENS, adapter=adapter, chunks=(1, 5, 3))
    bare = Job(prompt(seed), NUM_TOKENS)
    driver.run(whole)
    driver.run(chunked, bare)
    with oracle.with_adapter(base, adapter_folder) as model:
        expected = oracle.judge(model, prompt(seed), whole.token_ids)
    assert_parity(whole.sampled, expected, tolerance)
    assert_parity(chunked.sampled, expected, tolerance)
    assert bare.sampled[0].logprobs != whole.sampled[0].logprobs


@pytest.mark.parametrize("targets", oracle.TARGET_SETS)
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64])
def test_lora(rank: int, targets: str, driver: Driver, base: Any, tmp_path: Path) -> None:
    check(driver, base, oracle.save_lora(base, tmp_path / "lora", rank=rank, targets=targets, seed=rank), seed=rank)


@pytest.mark.parametrize("targets", oracle.TARGET_SETS)
@pytest.mark.parametrize(("rank", "rslora"), [(1, False), (8, True), (13, False)])
def test_dora(rank: int, rslora: bool, targets: str, driver: Driver, base: Any, tmp_path: Path) -> None:
    folder = oracle.save_lora(base, tmp_path / "dora", rank=rank, targets=targets, seed=rank, rslora=rslora, dora=True)
    check(driver, base, folder, seed=rank)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 8, 13, 64])
def test_eight_bits_of_what_eight_bits_hold(rank: int, dora: bool, folder: Path, base: Any, tmp_path: Path) -> None:
    """Rounded to 8 bits before it is saved, an adapter loses nothing by being kept in them."""
    adapter = oracle.save_lora(base, tmp_path / "lora", rank=rank, targets="all", seed=rank, dora=dora)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        if "lora_A" in name:
            weights[name] = rounded(weight)
        elif "lora_B" in name:
            weights[name] = rounded(weight.t()).t().contiguous()
    save_file(weights, adapter / "adapter_model.safetensors")
    driver = Driver(folder, page_size=8, store=tmp_path / "store", max_rank=64, adapter_dtype=torch.int8)
    # A DoRA's row scales are bfloat16 there, but near 1, and the scale less 1 is what is kept.
    check(driver, base, adapter, seed=rank, tolerance=5e-3 if dora else TOLERANCE)
    driver.close()


def test_eight_bits_change_less_than_sixteen_bit_activations(folder: Path, base: Any, tmp_path: Path) -> None:
    """Mean errors over PEFT's top five, teacher-forced, of adapters that change each layer's output by a tenth."""
    loras = [
        oracle.save_lora(base, tmp_path / f"{rank}", rank=rank, targets="all", seed=rank, gain=0.05, dora=rank == 6)
        for rank in (1, 6, 16, 64)
    ]

    def mean_error(dtype: torch.dtype, adapter_dtype: torch.dtype) -> float:
        driver = Driver(folder, store=tmp_path / "store", dtype=dtype, adapter_dtype=adapter_dtype)
        jobs = [Job(prompt(1), 40, adapter=driver.add(lora), forced=prompt(2, 40)) for lora in loras]
        driver.run(*jobs)
        driver.close()
        found = []
        for lora, job in zip(loras, jobs, strict=True):
            with oracle.with_adapter(base, lora) as model:
                found += errors(job.sampled, oracle.judge(model, job.prompt, job.forced))
        return float(np.mean(found))

    eight_bits = mean_error(torch.float32, torch.int8)
    activations = mean_error(torch.bfloat16, torch.bfloat16)
    assert eight_bits < 0.5 * activations
    assert mean_error(torch.bfloat16, torch.int8) < 1.2 * activations


def rounded(rows: torch.Tensor) -> torch.Tensor:
    values, scales = quantize_rows(rows)
    return values * scales[:, None]


@pytest.mark.parametrize("num_tokens", [1, 8, 20, 100])
def test_prefix(num_tokens: int, driver: Driver, base: Any, tmp_path: Path) -> None:
    check(driver, base, oracle.save_prefix(base, tmp_path / "prefix", num_tokens=num_tokens, seed=1), seed=num_tokens)


@pytest.mark.parametrize("encoder", ["", "MLP", "LSTM"])
@pytest.mark.parametrize("num_tokens", [1, 20, 100])
def test_prompt(num_tokens: int, encoder: str, driver: Driver, base: Any, tmp_path: Path) -> None:
    folder = oracle.save_prompt(base, tmp_path / "prompt", num_tokens=num_tokens, seed=1, encoder=encoder)
    check(driver, base, folder, seed=num_tokens)


def test_a_prompt_of_several_chunks(driver: Driver, base: Any, tmp_path: Path) -> None:
    check(driver, base, oracle.save_prompt(base, tmp_path / "prompt", num_tokens=300, seed=1), seed=3)


@pytest.mark.parametrize("variant", ["qwen3_bias", "qwen2_sliding", "smollm3", "llama_bias"])
def test_adapters_on_other_families(variant: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(variant, tmp_path / "model", seed=2)
    base = oracle.load_base(folder)
    driver = Driver(folder, page_size=4, store=tmp_path / "store")
    check(driver, base, oracle.save_lora(base, tmp_path / "lora", rank=5, targets="all", seed=1, rslora=True), seed=1)
    check(driver, base, oracle.save_lora(base, tmp_path / "dora", rank=5, targets="all", seed=1, dora=True), seed=1)
    check(driver, base, oracle.save_prefix(base, tmp_path / "prefix", num_tokens=6, seed=2), seed=2)
    check(driver, base, oracle.save_prompt(base, tmp_path / "prompt", num_tokens=11, seed=2), seed=2)
    driver.close()


def test_every_kind_in_one_batch_equals_each_alone(driver: Driver, base: Any, folder: Path, tmp_path: Path) -> None:
    folders = [
        oracle.save_lora(base, tmp_path / f"lora-{rank}", rank=rank, targets=targets, seed=rank)
        for rank, targets in ((1, "qv"), (4, "all"), (16, "attention"), (64, "all"))
    ]
    folders.append(oracle.save_lora(base, tmp_path / "dora", rank=6, targets="all", seed=6, dora=True))
    folders += [
        oracle.save_prefix(base, tmp_path / f"prefix-{tokens}", num_tokens=tokens, seed=tokens)
        for tokens in (1, 20, 100)
    ]
    for kind in ("pfeiffer", "houlsby", "parallel"):
        write_random_adapter(
            tmp_path / kind, kind=kind, hidden_size=64, num_layers=4, seed=3, gain=0.3, reduction_factor=4
        )
        folders.append(tmp_path / kind)
    adapters = [None, *(driver.add(adapter) for adapter in folders)]

    def jobs() -> list[Job]:
        # Two requests an adapter, of different lengths and chunks, so that prefill and decode share steps.
        return [
            Job(prompt(10 * i + j, 5 + 9 * i + j), NUM_TOKENS, adapter=adapter, chunks=(2 + i, 1 + j, 4))
            for i, adapter in enumerate(adapters)
            for j in range(2)
        ]

    together, alone = jobs(), jobs()
    assert len(together) == 24
    driver.run(*together)
    for mixed, single in zip(together, alone, strict=True):
        driver.run(single)
        assert mixed.token_ids == single.token_ids
        for a, b in zip(mixed.sampled, single.sampled, strict=True):
            assert a.logprobs is not None
            assert b.logprobs is not None
            assert dict(a.logprobs.top[:5]) == pytest.approx(dict(b.logprobs.top[:5]), abs=1e-4)
    for index, adapter_folder in enumerate(folders[:8], start=1):
        with oracle.with_adapter(base, adapter_folder) as model:
            job = together[2 * index]
            assert_parity(job.sampled, oracle.judge(model, job.prompt, job.token_ids))
