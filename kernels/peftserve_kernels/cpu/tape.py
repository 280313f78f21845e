"""Native calls recorded once and made again: a step without Python between its ops.

While a tape records, every native op runs as ever and is noted with its arguments, and every result is allocated from
a `TapeMemory`, whose addresses stay valid. A replay makes the same calls on the same addresses, so whatever changes
from step to step must lie in tensors that are refilled in place. Anything that torch computes itself would be missing
from the tape: `capture.CaptureGuard` refuses it, in the tests.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import finalize

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peftserve_kernels.capture import unguarded
from peftserve_kernels.cpu.extension import ops

Bytes = npt.NDArray[np.uint8]

_recording: "TapeMemory | None" = None


class TapeMemory:
    """Blocks for intermediate results: taken when a recorded op allocates one, free again when the last tensor on it
    goes. Tapes that share a memory must not run at the same time, nor may a result be read after another one ran.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Bytes] = {}  # by address, for good
        self._free: dict[int, list[Bytes]] = {}  # by size

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on a free block, or on a new one."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = _rounded(nbytes)
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._new(size)
        lease = block[:nbytes]  # lives as long as the tensor's storage
        finalize(lease, free.append, block)
        with unguarded():
            return torch.from_numpy(lease).view(dtype).view(shape)

    def keep(self, x: Tensor) -> Tensor:
        """`x` without its hold on the block: to be read until something else runs on this memory."""
        if not x.numel():
            return x
        block = self._blocks[x.data_ptr()]
        with unguarded():
            return torch.from_numpy(block[: x.nbytes]).view(x.dtype).view(x.shape)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def _new(self, size: int) -> Bytes:
        block = np.empty(size, np.uint8)
        self._blocks[block.ctypes.data] = block
        return block


class Tape:
    """One recorded sequence of native calls."""

    def __init__(self, memory: TapeMemory) -> None:
        self._memory = memory
        self._calls = ops.Tape()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the native calls in the block, which run too; what torch computes there is not recorded."""
        global _recording
        if _recording is not None:
            raise RuntimeError("a tape is being recorded already")
        _recording = self._memory
        self._calls.start()
        try:
            yield
        finally:
            self._calls.stop()
            _recording = None

    def __len__(self) -> int:
        """How many calls were recorded."""
        return len(self._calls)

    def replay(self) -> None:
        """Make the calls again, without the interpreter lock. Raises IndexError for a token id outside the table."""
        if not self._calls.replay():
            raise IndexError("a token id lies outside the embedding table")


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Where a native op writes its result: `torch.empty`, or the memory of the tape that is being recorded."""
    return torch.empty(shape, dtype=dtype) if _recording is None else _recording.empty(shape, dtype)


def _rounded(nbytes: int) -> int:
    """Up to a power of four, never 0: what a step does not touch of a block takes no memory, while a block for each
    size would take several times the largest step's, as tapes of more and more rows are recorded."""
    return 64 << 2 * -(-(-(-nbytes // 64) - 1).bit_length() // 2)
