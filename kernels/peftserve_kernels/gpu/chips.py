"""What the chips can do, from their makers' papers: the limits that resources are checked against."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from peftserve_kernels.gpu.launch import Target


class Chip(NamedTuple):
    """A card of a target. Limits are those of one multiprocessor (SM or CU); rates are those of the card.

    block_shared: bytes of shared memory a block may have; reserved_shared: what the system adds to each block.
    register_unit: registers are given to a warp in multiples of this many a thread. warps: resident warps.
    bandwidth: bytes a second of device memory; matrix_rate: dense bf16 or fp16 FLOP a second with float32 sums;
    vector_rate: float32 FLOP a second without tensor cores.
    """

    name: str
    warp_size: int
    block_shared: int
    shared: int
    reserved_shared: int
    registers: int
    register_unit: int
    warps: int
    blocks: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    source: str

    def blocks_resident(self, *, warps: int, registers: int, shared: int) -> int:
        """Blocks of so many warps, registers a thread and bytes of shared memory that one multiprocessor holds."""
        registers_a_thread = -(-max(registers, 1) // self.register_unit) * self.register_unit
        by_registers = self.registers // (registers_a_thread * self.warp_size) // warps
        used = shared + self.reserved_shared
        by_shared = self.shared // used if used else self.blocks
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


_KIB: Final = 1024

CHIPS: Final[Mapping[Target, Chip]] = {
    Target("cuda", 80): Chip(
        name="A100 SXM 80GB",
        warp_size=32,
        block_shared=163 * _KIB,
        shared=164 * _KIB,
        reserved_shared=_KIB,
        registers=65536,
        register_unit=8,
        warps=64,
        blocks=32,
        bandwidth=2039e9,
        matrix_rate=312e12,
        vector_rate=19.5e12,
        source="NVIDIA A100 datasheet (2021); CUDA programming guide, technical specifications, 8.0",
    ),
    Target("cuda", 90): Chip(
        name="H100 SXM",
        warp_size=32,
        block_shared=227 * _KIB,
        shared=228 * _KIB,
        reserved_shared=_KIB,
        registers=65536,
        register_unit=8,
        warps=64,
        blocks=32,
        bandwidth=3350e9,
        matrix_rate=989e12,
        vector_rate=67e12,
        source="NVIDIA H100 datasheet (dense rates); CUDA programming guide, technical specifications, 9.0",
    ),
    Target("cuda", 100): Chip(
        name="B200",
        warp_size=32,
        block_shared=227 * _KIB,
        shared=228 * _KIB,
        reserved_shared=_KIB,
        registers=65536,
        register_unit=8,
        warps=64,
        blocks=32,
        bandwidth=8000e9,
        matrix_rate=2250e12,
        vector_rate=80e12,
        source="NVIDIA DGX B200 datasheet, an eighth of the system (dense rates); CUDA programming guide, 10.0",
    ),
    Target("hip", "gfx942"): Chip(
        name="MI300X",
        warp_size=64,
        block_shared=64 * _KIB,
        shared=64 * _KIB,
        reserved_shared=0,
        registers=4 * 512 * 64,
        register_unit=8,
        warps=32,
        blocks=32,
        bandwidth=5300e9,
        matrix_rate=1307e12,
        vector_rate=163.4e12,
        source="AMD Instinct MI300X datasheet; CDNA 3 ISA guide (512 vector registers a lane and SIMD)",
    ),
}
