"""Compile launches without a GPU, for any target, and read what the binaries need.

A recorded launch is specialised by Triton's own binder and packed by its own code, so what is compiled here is what
the first such launch would compile on a card. It needs a process in which Triton does not interpret.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from peftserve_kernels.gpu.chips import CHIPS
from peftserve_kernels.gpu.launch import INTERPRETED, Launch, Target
from peftserve_kernels.gpu.sass import Counts, count, main_loop, parse

_TOOLS: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, eq=False, slots=True)
class Case:
    """One binary: a kernel specialised for a target. Plain data, to be sent to another process."""

    target: Target
    module: str
    kernel: str
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """Equal for launches that share a binary."""
        parts = (self.signature, self.constants, self.attributes, self.num_warps, self.num_stages)
        return f"{self.target}:{self.module}.{self.kernel}:{parts}"

    @property
    def constexprs(self) -> dict[str, Any]:
        """The kernel's constexpr parameters by name, specialised arguments (None, 1) included."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}


@dataclass(frozen=True, slots=True)
class Binary:
    """What a compiled kernel needs and does. Sizes in bytes; registers a thread.

    spills: stack or spilled registers. blocks: resident on one multiprocessor; occupancy: the share of its warps.
    has_product: whether the source has a matrix product (`tl.dot`).
    loop: one turn of the main loop, for one thread; whole: the kernel. On AMD only `whole` is filled, without macs.
    """

    registers: int
    spills: int
    shared: int
    block_warps: int
    blocks: int
    occupancy: float
    has_product: bool
    whole: Counts
    loop: Counts = field(default_factory=Counts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def case(launch: Launch, target: Target) -> Case:
    """What `launch` compiles to on `target`. Raises RuntimeError in a process in which Triton interprets."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels can be compiled only in a process without it")
    kernel = launch.kernel
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    backend = make_backend(_gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(*launch.arguments, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, options)
    return Case(
        target=target,
        module=kernel.fn.__module__,
        kernel=launch.name,
        signature=signature,
        constants=constants,
        attributes=attributes,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def compile_case(item: Case, *, only_products: bool = False) -> Binary:
    """Compile and look inside. Raises whatever Triton raises for a kernel that it cannot compile.

    only_products: read the machine code of kernels with a matrix product alone, for the disassembler takes a second.
    """
    kernel = getattr(importlib.import_module(item.module), item.kernel)
    source = ASTSource(kernel, item.signature, item.constants, item.attributes)
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=_gpu_target(item.target), options=options)
    has_product = "tt.dot" in compiled.asm["ttir"]
    if item.target.backend == "hip":
        read = _read_amd(compiled.asm["amdgcn"])
    else:
        read = _read_cubin(compiled.asm["cubin"], disassemble=has_product or not only_products)
    chip = CHIPS[item.target]
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    blocks = chip.blocks_resident(warps=warps, registers=read.registers, shared=shared)
    return Binary(
        registers=read.registers,
        spills=read.spills,
        shared=shared,
        block_warps=warps,
        blocks=blocks,
        occupancy=blocks * warps / chip.warps,
        has_product=has_product,
        whole=read.whole,
        loop=read.loop,
    )


def faults(item: Case, binary: Binary, *, wants_tensor_cores: bool) -> list[str]:
    """What must not be: spills, too much shared memory, and, where they are wanted, products without tensor cores."""
    chip = CHIPS[item.target]
    found = []
    if binary.spills or binary.whole.local:
        found.append(f"spills: {binary.spills} bytes, {binary.whole.local} local-memory instructions")
    if binary.shared > chip.block_shared:
        found.append(f"shared memory: {binary.shared} bytes, a block on {chip.name} may have {chip.block_shared}")
    if wants_tensor_cores and binary.has_product and not binary.whole.tensor:
        found.append("a matrix product without tensor-core instructions")
    return found


def _gpu_target(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, CHIPS[target].warp_size)


class _Read(NamedTuple):
    """What is read from the machine code."""

    registers: int
    spills: int
    whole: Counts
    loop: Counts


def _read_cubin(cubin: bytes, *, disassemble: bool) -> _Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = cuobjdump("--dump-resource-usage", file.name)
        listing = cuobjdump("-sass", file.name) if disassemble else ""
    (resources,) = resource_usage(usage).values()
    spills = resources["STACK"] + resources["LOCAL"]
    if not disassemble:
        return _Read(resources["REG"], spills, Counts(), Counts())
    (instructions,) = parse(listing).values()
    return _Read(resources["REG"], spills, count(instructions), count(main_loop(instructions)))


def resource_usage(text: str) -> dict[str, dict[str, int]]:
    """Function -> {REG, STACK, SHARED, LOCAL, ...} from `cuobjdump --dump-resource-usage`."""
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function ([^\s:]+):\s*\n\s*(REG:.*)", text)
    }


def _read_amd(assembly: str) -> _Read:
    def value(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    def number(pattern: str) -> int:
        return len(re.findall(rf"^\s+(?:{pattern})", assembly, re.MULTILINE))

    whole = Counts(
        total=number(r"[sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+"),
        tensor=number("v_mfma_|v_smfmac_"),
        global_loads=number("global_load|buffer_load"),
        shared_loads=number("ds_read|ds_load"),
        shared_stores=number("ds_write|ds_store"),
        shuffles=number("ds_bpermute|ds_permute|ds_swizzle"),
        local=number("scratch_"),
    )
    # vgpr_count covers the accumulation registers too: on gfx942 both come out of one file
    spills = value("private_segment_fixed_size") + 4 * (value("vgpr_spill_count") + value("sgpr_spill_count"))
    return _Read(value("vgpr_count"), spills, whole, Counts())


def cuobjdump(*arguments: str, directory: str | None = None) -> str:
    """Output of the `cuobjdump` that Triton brings along, run in `directory`."""
    command = [_tool("cuobjdump"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory).stdout


@cache
def _tool(name: str) -> str:
    path = _TOOLS / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this Triton comes without NVIDIA's tools")
    return str(path)
