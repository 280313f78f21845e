"""What an engine's memory goes to: KV pages and adapters, as asked for, or as much as a GPU has left.

On a GPU the sizes that the settings leave open follow from what is there: of the card's memory a share
(`gpu_memory_utilization`) may be this engine's; weights and what a step needs at its largest come first, adapters get a
sixteenth of the rest, KV pages what then remains. All of that is arithmetic on shapes, so it is settled, or refused,
before anything is loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from peftserve.config import EngineConfig
from peftserve.errors import ConfigurationError
from peftserve.model.layout import expected_tensors
from peftserve.model.spec import TARGET_NAMES, ModelSpec, targets
from peftserve_kernels.gpu.decode_splits import workspace_bytes

_MIB: Final = 2**20
_GIB: Final = 2**30

CPU_KV_CACHE_BYTES: Final = 256 * _MIB
CPU_ADAPTER_BYTES: Final = 64 * _MIB
"""Where nobody asked for a size, on the CPU: its memory is also everybody else's."""

# An element of NF4: 4 bits, and a float32 scale for 64 of them.
_NF4_BYTES: Final = 0.5 + 4 / 64

# Loaded kernels, captured graphs and workspaces of libraries, which take memory outside of torch's allocator.
_DRIVER_BYTES: Final = 512 * _MIB

# Blocks of an allocator do not fit together without gaps.
_FRAGMENTATION: Final = 1.1

# What is left goes to adapters by this part, but at most to the half.
_ADAPTER_SHARE: Final = 16


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU's memory in bytes before anything of ours is on it; `free` lacks what others hold, the driver included."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes for KV pages, prefix adapters included, and for LoRA and bottleneck weights."""

    kv_cache_bytes: int
    adapter_device_bytes: int


def plan_memory(config: EngineConfig, spec: ModelSpec, element_bytes: int, device: DeviceMemory | None) -> MemoryPlan:
    """The sizes for `config`, the open ones (0) filled in. `device` is None on the CPU.

    `element_bytes`: of an activation. Raises `ConfigurationError` where a GPU has too little memory, with what each
    part takes.
    """
    if device is None:
        return MemoryPlan(config.kv_cache_bytes or CPU_KV_CACHE_BYTES, config.adapter_device_bytes or CPU_ADAPTER_BYTES)
    model = weight_bytes(spec, element_bytes)
    step = step_bytes(config, spec, element_bytes)
    allowed = min(int(device.total * config.gpu_memory_utilization), device.free)
    if config.kv_cache_bytes and config.adapter_device_bytes:
        # Whoever names both sizes has shared out the card, and is held only to what is there.
        allowed = device.free
    room = allowed - model - step
    adapters = config.adapter_device_bytes or _adapter_bytes(config, spec, element_bytes, room - config.kv_cache_bytes)
    kv = config.kv_cache_bytes or room - adapters
    if min(kv, adapters) <= 0 or kv + adapters > room:
        raise ConfigurationError(
            f"gpu_memory_utilization: {config.gpu_memory_utilization} of {_gib(device.total)}, of which others leave "
            f"{_gib(device.free)}, is too little: the model takes {_gib(model)}, a step {_gib(step)}"
            + _asked("kv_cache_bytes", config.kv_cache_bytes)
            + _asked("adapter_device_bytes", config.adapter_device_bytes)
            + "; raise it, lower max_batch_tokens, max_num_seqs or the sizes asked for, or free the card",
            field="gpu_memory_utilization",
        )
    return MemoryPlan(kv, adapters)


def weight_bytes(spec: ModelSpec, element_bytes: int) -> int:
    """What `model.weights.load_weights` leaves on the device: NF4 projections, float32 norms and biases, the rest in
    the activations' dtype."""

    def size(shape: Iterable[int], each: float) -> float:
        count = each
        for length in shape:
            count *= length
        return count

    total = 0.0
    for info in expected_tensors(spec).values():
        if info.quantized:
            total += size(info.shape, _NF4_BYTES)
        else:
            total += size(info.shape, element_bytes if len(info.shape) > 1 else 4)
    return int(total)


def step_bytes(config: EngineConfig, spec: ModelSpec, element_bytes: int) -> int:
    """What steps need beside weights, KV pages and adapters, at the most: activations of a full prefill and of a full
    decode (a captured one keeps its own), logits, the sums of split attention and of adapters, tables, the driver."""
    rows, tokens = config.max_num_seqs, max(config.max_batch_tokens, config.max_num_seqs)
    context = config.max_model_len or spec.max_position_embeddings
    # The residual stream, its update and a normalised copy; q, k, v and attention's result; gate, up, their product.
    wide = 2 * spec.hidden_size * 4
    narrow = spec.hidden_size + 2 * (spec.q_size + spec.kv_size) + 3 * spec.intermediate_size
    token = wide + narrow * element_bytes
    # Sums of an adapter's rank rows, for each piece of an output: a merged layer has few.
    low_rank = (tokens // 16 + rows) * 16 * config.max_adapter_rank * 4 * 8
    # Logits and what sampling derives from them: penalised ones, and weights for the search.
    logits = 3 * rows * spec.vocab_size * 4
    window = 0 if spec.sliding_layers and not all(spec.sliding_layers) else spec.sliding_window or 0
    splits = workspace_bytes(rows, spec.num_heads, spec.head_dim, context, window)
    pages = -(-config.max_adapter_rank // 8)
    tables = config.max_device_adapters * spec.num_layers * (len(TARGET_NAMES) * (2 * pages * 8 + 16) + 8 * pages * 8)
    tables += rows * -(-context // config.page_size) * 4
    # Both kinds of step keep theirs: graphs have a pool of their own.
    needed = (tokens + rows) * token + 2 * (logits + splits) + low_rank + tables
    return int(needed * _FRAGMENTATION) + _DRIVER_BYTES


def _adapter_bytes(config: EngineConfig, spec: ModelSpec, element_bytes: int, room: int) -> int:
    """A part of `room`, but enough for one adapter of the largest rank on every target."""
    widths = sum(target.in_features + target.out_features for target in targets(spec))
    largest = spec.num_layers * -(-config.max_adapter_rank // 8) * 8 * widths * element_bytes
    return min(max(room // _ADAPTER_SHARE, largest), room // 2)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _asked(name: str, size: int) -> str:
    return f", {name} asks for {_gib(size)}" if size else ""
