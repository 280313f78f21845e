"""The same static figures of bitsandbytes' own 4-bit kernels, read from the library in its wheel.

Nothing of it is imported or run. Each of its kernels unpacks a weight once, right behind the load that brought its
byte, so the loads of packed bytes in the main loop say how many weights a turn unpacks.
"""

import importlib.util
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from peftserve_kernels.gpu.aot import cuobjdump, resource_usage
from peftserve_kernels.gpu.launch import Target
from peftserve_kernels.gpu.sass import Counts, count, load_bytes, loop_with, parse

_LIBRARY: Final = "libbitsandbytes_cuda130.so"

# (name to print, mangled name, opcode of the loads that bring packed weights). gemm_4bit_simt<T, M> is for exactly M
# rows; the other is a tile of rows, columns and depth for what has more. Weights are read once: evict first.
_KERNELS: Final = (
    *((f"gemm_4bit_simt<bf16, {m}>", rf"gemm_4bit_simtI13__nv_bfloat16Li{m}E", "LDG.E.EF") for m in (1, 2, 4, 8)),
    *(
        (f"gemm_4bit_sm80_m16n8k16<bf16, {m}, {n}, {k}>", rf"k16I13__nv_bfloat16Li{m}ELi{n}ELi{k}E", "LDG.E.EF")
        for m, n, k in ((32, 64, 128), (64, 64, 64), (128, 64, 64), (128, 128, 64))
    ),
    # what it does before a dense product: NF4 to bf16 through memory
    ("kDequantizeBlockwise<bf16, NF4>", r"kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2E", "LDG.E.U8"),
)


class PeerKernel(NamedTuple):
    """One of its kernels. weights: unpacked by a thread in one turn of the loop that unpacks."""

    name: str
    registers: int
    shared: int
    loop: Counts
    weights: int

    @property
    def instructions_per_weight(self) -> float:
        return self.loop.total / self.weights


def library() -> Path | None:
    """bitsandbytes' CUDA 13.0 library, or None where its wheel brings none."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _LIBRARY
    return path if path.is_file() else None


@cache
def peer_kernels(target: Target) -> tuple[PeerKernel, ...]:
    """Its 4-bit kernels for `target`; none for a target that the library has no code for."""
    path = library()
    if path is None or target.backend != "cuda":
        return ()
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", f"sm_{target.arch}.cubin", str(path), directory=folder)
        cubins = list(Path(folder).glob("*.cubin"))
        if len(cubins) != 1:
            return ()
        cubin = str(cubins[0])
        usage = resource_usage(cuobjdump("--dump-resource-usage", cubin))
        found = []
        for name, pattern, opcode in _KERNELS:
            mangled = next((each for each in usage if re.search(pattern, each)), None)
            if mangled is None:
                continue
            (instructions,) = parse(cuobjdump("-sass", "-fun", mangled, cubin)).values()
            loop = loop_with(instructions, opcode)
            packed = sum(
                load_bytes(each) for each in loop if each.opcode.startswith(opcode) and _is_weight(each.opcode)
            )
            if packed:
                resources = usage[mangled]
                found.append(PeerKernel(name, resources["REG"], resources["SHARED"], count(loop), 2 * packed))
    return tuple(found)


def _is_weight(opcode: str) -> bool:
    """Not a quantised absmax: those come through the read-only path."""
    return not opcode.endswith("CONSTANT")
