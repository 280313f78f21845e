"""Native calls recorded once and made again, for steps of any size: a step without Python between its ops.

While a tape records, native ops only note their arguments, and every result is a place in a `TapeMemory`, whose
addresses stay valid. A replay makes the calls on these addresses, for as many tokens as the step has, so whatever else
changes from step to step must lie in tensors that are refilled in place. Anything that torch computes itself would be
missing from the tape: `capture.CaptureGuard` refuses it, in the tests.
"""

import math
import mmap
import threading
from bisect import bisect, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from peftserve_kernels.capture import unguarded
from peftserve_kernels.cpu.extension import ops

_ALIGNMENT: Final = 64
_REGION_BYTES: Final = 64 << 20
# Between results, which are whole pages for the tokens of most settings: their rows would meet in the same cache sets.
_STAGGER: Final = 13 * _ALIGNMENT
# Linux' number; Python has no name for it before 3.13.
_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0)


class _Recording(threading.local):
    """What a thread records to: the calls that others make meanwhile are made."""

    memory: "TapeMemory | None" = None


_recording = _Recording()


class TapeMemory:
    """Where recorded ops put their results: each at the lowest address that is free, until the last tensor on it goes.

    Tapes that share a memory must not run at the same time, nor may a result be read after another one ran. A page of
    it is taken from the system when a step first writes there.
    """

    def __init__(self) -> None:
        self._regions: list[_Region] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT + _STAGGER
        region, start = self._take(size)
        lease = region.memory[start : start + nbytes]  # lives as long as the tensor's storage
        finalize(lease, region.give_back, start, size)
        with unguarded():
            return torch.from_numpy(lease).view(dtype).view(shape)

    def keep(self, x: Tensor) -> Tensor:
        """`x` without its hold on the place: to be read until something else runs on this memory."""
        if not x.numel():
            return x
        region = next(region for region in self._regions if 0 <= x.data_ptr() - region.address < len(region.memory))
        start = x.data_ptr() - region.address
        with unguarded():
            return torch.from_numpy(region.memory[start : start + x.nbytes]).view(x.dtype).view(x.shape)

    @property
    def nbytes(self) -> int:
        """What all tapes together can touch."""
        return sum(region.used for region in self._regions)

    def _take(self, size: int) -> tuple["_Region", int]:
        for region in self._regions:
            if (start := region.take(size)) is not None:
                return region, start
        self._regions.append(_Region(max(size, _REGION_BYTES)))
        return self._take(size)


class _Region:
    """A mapping of `size` bytes, and the holes in it: (start, end), ascending, never touching."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.memory = np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
        self.address: int = self.memory.ctypes.data
        self.used = 0
        self._holes = [(0, size)]

    def take(self, size: int) -> int | None:
        for index, (start, end) in enumerate(self._holes):
            if size <= end - start:
                self._holes[index : index + 1] = [(start + size, end)] if size < end - start else []
                self.used = max(self.used, start + size)
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        end = start + size
        index = bisect(self._holes, (start, end))
        if index < len(self._holes) and self._holes[index][0] == end:
            end = self._holes.pop(index)[1]
        if index and self._holes[index - 1][1] == start:
            start = self._holes.pop(index - 1)[0]
        insort(self._holes, (start, end))


class Tape:
    """Recorded sequences of native calls."""

    def __init__(self, memory: TapeMemory) -> None:
        self._memory = memory
        self._calls = ops.Tape()

    @contextmanager
    def recording(self, *, sampled: bool = False) -> Iterator[None]:
        """Records the native calls in the block, after those that are there; they don't run.

        Their tensors have a row for each token of the largest step; `sampled`: for each token that is sampled after.
        """
        if _recording.memory is not None:
            raise RuntimeError("a tape is being recorded already")
        _recording.memory = self._memory
        self._calls.start(sampled)
        try:
            yield
        finally:
            self._calls.stop()
            _recording.memory = None

    def __len__(self) -> int:
        """How many calls were recorded."""
        return len(self._calls)

    def replay(self, tokens: int, sequences: int = 0, sampled: int = 0) -> None:
        """Make the calls for the first `tokens` tokens of `sequences` sequences, without the interpreter lock.

        There are taken to be as many segments of adapters as sequences: where there are fewer, empty ones follow.
        Raises IndexError for a token id outside the table, ValueError for a larger step than was recorded.
        """
        if not self._calls.replay(tokens, sequences, sampled):
            raise IndexError("a token id lies outside the embedding table")


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Where a native op writes its result: `torch.empty`, or the memory of the tape that is being recorded."""
    memory = _recording.memory
    return torch.empty(shape, dtype=dtype) if memory is None else memory.empty(shape, dtype)
