"""How a GPU's memory is shared out, without one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peftserve.config import EngineConfig
from peftserve.errors import ConfigurationError
from peftserve.model.config_reader import read_spec
from peftserve.model.memory_plan import DeviceMemory, MemoryPlan, plan_memory, step_bytes, weight_bytes
from peftserve.model.spec import ModelSpec
from peftserve.model.weights import load_weights
from peftserve_kernels.nf4 import Nf4Weight

GIB, MIB = 2**30, 2**20

LLAMA = ModelSpec(
    name="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
)


def plan(total: float, free: float | None = None, **settings: Any) -> MemoryPlan:
    device = DeviceMemory(int(total * GIB), int((total if free is None else free) * GIB))
    return plan_memory(EngineConfig(**settings), LLAMA, 2, device)


def test_the_cpu_has_fixed_sizes() -> None:
    assert plan_memory(EngineConfig(), LLAMA, 2, None) == MemoryPlan(256 * MIB, 64 * MIB)
    asked = EngineConfig(kv_cache_bytes="1GiB", adapter_device_bytes="8KiB")
    assert plan_memory(asked, LLAMA, 2, None) == MemoryPlan(GIB, 8192)


@pytest.mark.parametrize("utilization", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("total", [24, 80, 192])
def test_all_parts_together_are_the_share_of_the_card(total: int, utilization: float) -> None:
    config = EngineConfig(gpu_memory_utilization=utilization)
    found = plan(total, gpu_memory_utilization=utilization)
    parts = found.kv_cache_bytes + found.adapter_device_bytes + weight_bytes(LLAMA, 2) + step_bytes(config, LLAMA, 2)
    assert parts == int(total * GIB * utilization)
    assert found.kv_cache_bytes >= found.adapter_device_bytes > 0


def test_what_others_hold_is_not_shared_out() -> None:
    assert plan(80, 79).kv_cache_bytes == plan(80).kv_cache_bytes, "within the tenth that is left anyhow"
    taken = plan(80, 40)
    parts = taken.kv_cache_bytes + taken.adapter_device_bytes
    assert parts + weight_bytes(LLAMA, 2) + step_bytes(EngineConfig(), LLAMA, 2) == 40 * GIB


def test_a_size_that_is_asked_for_stays() -> None:
    assert plan(80, kv_cache_bytes="4GiB").kv_cache_bytes == 4 * GIB
    assert plan(80, kv_cache_bytes="4GiB").adapter_device_bytes < plan(80).adapter_device_bytes * 2
    found = plan(80, adapter_device_bytes="10GiB")
    assert found.adapter_device_bytes == 10 * GIB
    both = plan(80).kv_cache_bytes + plan(80).adapter_device_bytes
    assert found.kv_cache_bytes == both - 10 * GIB
    # both are asked for: nothing is left open, so the share has no say
    assert plan(80, kv_cache_bytes="60GiB", adapter_device_bytes="4GiB", gpu_memory_utilization=0.1) == MemoryPlan(
        60 * GIB, 4 * GIB
    )


def test_adapters_have_room_for_one_of_the_largest_rank() -> None:
    widths = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    largest = 32 * 128 * widths * 2
    assert plan(16).adapter_device_bytes == largest
    assert plan(16, max_adapter_rank=8).adapter_device_bytes < largest
    assert plan(192).adapter_device_bytes > 10 * largest


@pytest.mark.parametrize(
    ("total", "free", "settings", "shown"),
    [
        (8, 2, {}, r"0\.9 of 8\.00 GiB, of which others leave 2\.00 GiB, is too little: the model takes 5\.\d\d GiB"),
        (80, 80, {"gpu_memory_utilization": 0.05}, "raise it, lower max_batch_tokens"),
        (80, 80, {"kv_cache_bytes": "90GiB"}, "kv_cache_bytes asks for 90.00 GiB"),
        (80, 80, {"adapter_device_bytes": "75GiB"}, "adapter_device_bytes asks for 75.00 GiB"),
        (80, 80, {"kv_cache_bytes": "70GiB", "adapter_device_bytes": "10GiB"}, "for 70.00 GiB, adapter_device_bytes"),
    ],
)
def test_too_little_memory_is_refused(total: float, free: float, settings: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigurationError, match=shown) as caught:
        plan(total, free, **settings)
    assert caught.value.field == "gpu_memory_utilization"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_take_what_was_planned(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    spec = read_spec(tiny_checkpoint)
    weights = load_weights(tiny_checkpoint, spec, dtype, torch.device("cpu"))
    tensors = [weights.embedding, weights.norm, weights.lm_head]
    tensors += [getattr(layer, name) for layer in weights.layers for name in layer.__slots__]
    actual = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor | Nf4Weight))
    assert weight_bytes(spec, dtype.itemsize) == actual


def test_a_step_needs_more_the_larger_it_may_be() -> None:
    def needs(**settings: Any) -> int:
        return step_bytes(EngineConfig(**settings), LLAMA, 2)

    least = needs()
    assert 512 * MIB < least < 2 * GIB
    larger = ({"max_batch_tokens": 8192}, {"max_num_seqs": 256}, {"max_adapter_rank": 256})
    for settings in larger:
        assert needs(**settings) > least, settings
    # beyond the splits that one query may have, a longer context costs its block tables alone
    assert needs(max_model_len=131072) - needs(max_model_len=65536) < 2 * MIB
    assert needs(max_model_len=256) < least
