"""Puts an engine together from its settings: the one place where the torch half meets the scheduler."""

from collections.abc import Callable
from pathlib import Path

import torch

from peftserve.adapters.blobs import adapters_root
from peftserve.config import EngineConfig
from peftserve.engine.adapter_cache import AdapterCache
from peftserve.engine.core import EngineCore
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.messages import EngineInfo
from peftserve.engine.scheduler import Scheduler, SchedulerLimits
from peftserve.errors import ConfigurationError
from peftserve.model.adapter_memory import DeviceAdapterMemory
from peftserve.model.config_reader import read_spec
from peftserve.model.kv import KvCache
from peftserve.model.memory_plan import DeviceMemory, plan_memory
from peftserve.model.runner import Runner
from peftserve.model.spec import ModelSpec
from peftserve.model.weights import load_weights
from peftserve_kernels.cpu.extension import HAS_NATIVE
from peftserve_kernels.cpu.threads import available_cores, set_threads, threads
from peftserve_kernels.nf4_linear import why_no_int8_inputs


def build_engine(config: EngineConfig, checkpoint: Path, wake: Callable[[], None]) -> tuple[EngineCore, EngineInfo]:
    """Load the checkpoint and allocate the caches. `wake` is called from a loader thread when a step has work.

    Raises `ConfigurationError` for settings that cannot work together or on this machine.
    """
    device = _device(config.device)
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.int8_activations and (reason := why_no_int8_inputs(device, dtype)):
        raise ConfigurationError(f"int8_activations: {reason}", field="int8_activations")
    adapter_dtype = _adapter_dtype(config.adapter_dtype, device, dtype)
    set_threads(config.threads or available_cores())
    torch.set_num_threads(threads())
    spec = read_spec(checkpoint)
    plan = plan_memory(config, spec, dtype.itemsize, _memory_of(device))
    num_pages = plan.kv_cache_bytes // spec.kv_page_bytes(config.page_size, dtype.itemsize)
    max_model_len = _max_model_len(config, plan.kv_cache_bytes, spec, num_pages, dtype.itemsize)

    weights = load_weights(checkpoint, spec, dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left behind is counted on for the KV cache
    kv_memory = KvCache(spec, num_pages=num_pages, page_size=config.page_size, dtype=dtype, device=device)
    memory = DeviceAdapterMemory(
        spec,
        kv_memory,
        root=adapters_root(config.data_dir),
        arena_bytes=plan.adapter_device_bytes,
        num_slots=config.max_device_adapters,
        max_rank=config.max_adapter_rank,
        dtype=adapter_dtype,
        base=weights,
        int8_activations=config.int8_activations,
    )
    kv = KvPageManager(num_pages, config.page_size, prefix_caching=config.prefix_caching)
    adapters = AdapterCache(
        memory,
        kv,
        host_bytes=config.adapter_host_bytes,
        retry_s=config.adapter_retry_s,
        starvation_s=config.starvation_s,
        on_done=wake,
    )
    limits = SchedulerLimits(
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        starvation_s=config.starvation_s,
        stop_token_ids=spec.stop_token_ids,
    )
    runner = Runner(
        weights,
        spec,
        kv_memory,
        memory,
        max_context=max_model_len,
        max_tokens=config.max_batch_tokens,
        max_rows=0 if config.eager else config.max_num_seqs,
        int8_activations=config.int8_activations,
    )
    info = EngineInfo(
        spec=spec,
        dtype=str(dtype).removeprefix("torch."),
        adapter_dtype=str(adapter_dtype).removeprefix("torch."),
        device=str(device),
        threads=threads(),
        max_model_len=max_model_len,
        num_kv_pages=num_pages,
        page_size=config.page_size,
        kv_cache_bytes=kv_memory.nbytes,
        adapter_device_bytes=plan.adapter_device_bytes,
        adapter_host_bytes=config.adapter_host_bytes,
        max_adapter_rank=config.max_adapter_rank,
        int8_activations=config.int8_activations,
    )
    if HAS_NATIVE and device.type == "cpu":
        # What torch still does in a step is small, and a second pool of threads that wait would slow ours.
        torch.set_num_threads(1)
    return EngineCore(Scheduler(limits, kv, adapters), kv, adapters, runner), info


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device: cuda was asked for, but torch finds no usable GPU", field="device")
    return torch.device(name)


def _adapter_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Automatically int8 where it is known to be faster, and changes less than 16-bit activations do."""
    is_int8 = name == "int8" or (name == "auto" and device.type == "cpu" and dtype != torch.float32)
    return torch.int8 if is_int8 else dtype


def _memory_of(device: torch.device) -> DeviceMemory | None:
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total=total, free=free)


def _max_model_len(
    config: EngineConfig, kv_cache_bytes: int, spec: ModelSpec, num_pages: int, element_bytes: int
) -> int:
    """The context limit in tokens; one sequence of it must fit the KV cache, or it could never be served."""
    # A prefix that does not end with a page costs a page more: its last one is copied for each request.
    holds = max(num_pages - 1, 0) * config.page_size
    wanted = config.max_model_len or min(spec.max_position_embeddings, holds)
    if wanted > spec.max_position_embeddings:
        raise ConfigurationError(
            f"max_model_len: {wanted} exceeds the model's {spec.max_position_embeddings} positions",
            field="max_model_len",
        )
    if wanted > holds or holds == 0:
        page_bytes = spec.kv_page_bytes(config.page_size, element_bytes)
        needed = (max(-(-wanted // config.page_size), 1) + 1) * page_bytes
        raise ConfigurationError(
            f"kv_cache_bytes: {kv_cache_bytes} holds {holds} tokens; a context of {wanted or 1} needs {needed}",
            field="kv_cache_bytes",
        )
    return wanted
