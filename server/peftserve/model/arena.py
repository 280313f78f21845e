"""Room in a flat arena, counted in elements: best fit, coalescing, and scattering when no hole is big enough.

An adapter is a list of blocks (pages and bias vectors) that kernels reach through offset tables, so its blocks need not
lie together. They do whenever a hole is big enough, because one long copy is cheaper than many; else they are spread
over several holes, so that fragmentation costs at most a block's size per hole.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftserve.errors import InternalError

ALIGNMENT = 64
"""Every block starts at a multiple of this many elements: 128 bytes in 16-bit types, a cache line or two."""


def align(size: int) -> int:
    """`size` rounded up to the alignment, in elements."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Elements `start .. start + size` of the arena."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Arena:
    """Allocator over `capacity` elements (rounded down to the alignment); holds offsets only, no memory."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.free_size = self.capacity
        # Sorted by start; neighbours never touch, because `free` joins them.
        self._holes = [Extent(0, self.capacity)] if self.capacity else []
        self._used: dict[int, int] = {}

    @property
    def used_size(self) -> int:
        return self.capacity - self.free_size

    def allocate(self, ends: Sequence[int]) -> tuple[Extent, ...] | None:
        """Room for blocks that end at `ends` (ascending, aligned) when they lie one after another from 0.

        Returns extents that take the blocks in order, each a whole number of them, or None (and nothing changes)
        when they do not fit.
        """
        if not ends:
            return ()
        if any(end % ALIGNMENT for end in ends):
            raise InternalError(f"arena blocks must end at multiples of {ALIGNMENT} elements")
        total = ends[-1]
        if total > self.free_size:
            return None
        fitting = [hole for hole in self._holes if hole.size >= total]
        if fitting:
            best = min(fitting, key=lambda hole: (hole.size, hole.start))
            extents: list[Extent] | None = [Extent(best.start, total)]
        else:
            extents = self._scatter(ends)
        if extents is None:
            return None
        for extent in extents:
            self._take(extent)
        return tuple(extents)

    def free(self, extents: Iterable[Extent]) -> None:
        """Give extents of `allocate` back. Raises `InternalError` for one that is not in use."""
        for extent in extents:
            if self._used.pop(extent.start, None) != extent.size:
                raise InternalError(f"arena elements {extent.start}..{extent.end} are not an extent in use")
            self.free_size += extent.size
            index = bisect_right(self._holes, extent)
            start, end = extent.start, extent.end
            if index < len(self._holes) and self._holes[index].start == end:
                end = self._holes.pop(index).end
            if index and self._holes[index - 1].end == start:
                start = self._holes.pop(index - 1).start
            insort(self._holes, Extent(start, end - start))

    def check(self) -> None:
        """Raise `InternalError` unless holes and used extents tile the arena exactly and no two holes touch."""
        used = [Extent(start, size) for start, size in self._used.items()]
        position = 0
        previous_free = False
        for extent in sorted(used + self._holes):
            free = extent.start not in self._used
            if extent.start != position or extent.size <= 0 or (free and previous_free):
                raise InternalError(f"arena is torn at element {position}: next extent is {extent}")
            position, previous_free = extent.end, free
        if position != self.capacity or sum(hole.size for hole in self._holes) != self.free_size:
            raise InternalError(f"arena of {self.capacity} elements accounts for {position}")

    def _scatter(self, ends: Sequence[int]) -> list[Extent] | None:
        # Largest hole first gives the fewest pieces.
        extents: list[Extent] = []
        placed = first = 0
        for hole in sorted(self._holes, key=lambda hole: (-hole.size, hole.start)):
            last = bisect_right(ends, placed + hole.size, lo=first)
            if last > first:
                extents.append(Extent(hole.start, ends[last - 1] - placed))
                placed, first = ends[last - 1], last
            if first == len(ends):
                return extents
        return None

    def _take(self, extent: Extent) -> None:
        # An extent always starts where its hole does, so what is left of the hole lies behind it.
        index = bisect_right(self._holes, Extent(extent.start, self.capacity)) - 1
        hole = self._holes.pop(index)
        if hole.size > extent.size:
            self._holes.insert(index, Extent(extent.end, hole.size - extent.size))
        self._used[extent.start] = extent.size
        self.free_size -= extent.size
