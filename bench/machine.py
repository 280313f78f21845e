"""What the figures were measured on, and how fast it reads memory and multiplies matrices.

No host name, user or path: results are meant to be published.
"""

import os
import platform
import statistics
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from measure import Call, Effort, interleave

READ_BYTES = 256 * 2**20
GEMM_SIZE = 2048
_PROBE_SIZE = 192
_FALLBACK_CACHE_BYTES = 32 * 2**20

_CPU_INFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16")
_ISA_ARM = ("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2")
_PACKAGES = ("peftserve", "torch", "transformers", "peft", "bitsandbytes", "triton")
_SETTINGS = ("PEFTSERVE_KERNELS", "PEFTSERVE_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@cache
def dense_dtype() -> torch.dtype:
    """What torch multiplies fastest in, here: bfloat16 where the processor has instructions for it (elsewhere torch's
    product is a plain loop), else float32. The dense rivals and the arithmetic limit use it."""
    if torch.get_default_device().type == "cuda":
        return torch.bfloat16
    x = torch.randn(_PROBE_SIZE, _PROBE_SIZE)
    candidates = {dtype: x.to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    calls = {str(dtype): partial(torch.mm, values, values) for dtype, values in candidates.items()}
    seconds = interleave(calls, Effort(rounds=3, turn_s=0.005))
    return min(candidates, key=lambda dtype: statistics.median(seconds[str(dtype)]))


class Limits:
    """The two probes that bound every op: reads of more memory than any cache holds, and a square product."""

    def __init__(self, *, quick: bool) -> None:
        elements = READ_BYTES // 4 // (64 if quick else 1)
        size = GEMM_SIZE // (8 if quick else 1)
        self._memory = torch.ones(elements)
        self._a = torch.randn(size, size).to(dense_dtype())
        self._b = torch.randn(size, size).to(dense_dtype())
        self.read_bytes = self._memory.nbytes
        self.gemm_flops = 2 * size**3

    def probes(self) -> dict[str, Call]:
        """`read` and `gemm`, to be timed among the variants they bound."""
        return {"read": self._memory.sum, "gemm": lambda: torch.mm(self._a, self._b)}

    def seconds(self, read_s: float, gemm_s: float, *, nbytes: int, flops: int) -> float:
        """The least time for an op that reads `nbytes` and computes `flops` (roofline; Williams et al. 2009)."""
        return max(nbytes * read_s / self.read_bytes, flops * gemm_s / self.gemm_flops)

    def measure(self, effort: Effort) -> dict[str, Any]:
        """`read_bytes_per_s` and `gemm_flops`, medians, and the product's dtype."""
        seconds = interleave(self.probes(), effort)
        return {
            "read_bytes_per_s": self.read_bytes / statistics.median(seconds["read"]),
            "gemm_dtype": str(self._a.dtype).removeprefix("torch."),
            "gemm_flops": self.gemm_flops / statistics.median(seconds["gemm"]),
        }


def last_level_cache_bytes() -> int:
    """The largest cache of the first core (32 MiB where the system does not tell), or of the GPU if that is torch's
    default device."""
    if torch.get_default_device().type == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    found = [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")]
    return max(found, default=_FALLBACK_CACHE_BYTES)


def describe(limits: Limits, effort: Effort) -> dict[str, Any]:
    """The machine, the software and the two limits as they are now. `load_average` tells whether it was idle."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "isa": flags,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        **limits.measure(effort),
    }


def _cpu() -> tuple[str, list[str]]:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name") or platform.machine(), [name for name in (*_ISA, *_ISA_ARM) if name in flags]
