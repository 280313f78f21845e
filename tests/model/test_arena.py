"""The arena's allocator against a plain model of what must hold, as a state machine."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from peftserve.errors import InternalError
from peftserve.model.arena import ALIGNMENT, Arena, Extent, align


def ends_of(blocks: list[int]) -> list[int]:
    return [sum(blocks[: i + 1]) * ALIGNMENT for i in range(len(blocks))]


def test_best_fit_takes_the_smallest_hole_that_is_big_enough() -> None:
    arena = Arena(20 * ALIGNMENT)
    parts = [arena.allocate(ends_of([size])) for size in (4, 1, 2, 1, 6)]
    assert all(parts)
    for index in (0, 2, 4):
        arena.free(parts[index] or ())
    assert arena.allocate(ends_of([2])) == (Extent(5 * ALIGNMENT, 2 * ALIGNMENT),)
    assert arena.allocate(ends_of([1, 2])) == (Extent(0, 3 * ALIGNMENT),)


def test_neighbouring_holes_join_whatever_the_order_of_frees() -> None:
    arena = Arena(6 * ALIGNMENT)
    parts = [arena.allocate(ends_of([2])) for _ in range(3)]
    for index in (0, 2, 1):
        arena.free(parts[index] or ())
        arena.check()
    assert arena.allocate(ends_of([6])) == (Extent(0, 6 * ALIGNMENT),)


def test_blocks_are_scattered_over_holes_when_none_is_big_enough() -> None:
    arena = Arena(7 * ALIGNMENT)
    parts = [arena.allocate(ends_of([size])) for size in (2, 1, 3, 1)]
    arena.free(parts[0] or ())
    arena.free(parts[2] or ())
    assert arena.allocate(ends_of([2, 2, 1])) is None
    extents = arena.allocate(ends_of([1, 2, 2]))
    assert extents == (Extent(3 * ALIGNMENT, 3 * ALIGNMENT), Extent(0, 2 * ALIGNMENT))
    assert arena.free_size == 0
    arena.check()


def test_capacity_is_rounded_down_and_sizes_up() -> None:
    assert Arena(2 * ALIGNMENT + 1).capacity == 2 * ALIGNMENT
    assert Arena(ALIGNMENT - 1).allocate([ALIGNMENT]) is None
    assert [align(size) for size in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]


def test_wrong_calls_are_refused() -> None:
    arena = Arena(4 * ALIGNMENT)
    with pytest.raises(InternalError, match="multiples"):
        arena.allocate([1])
    extents = arena.allocate(ends_of([1])) or ()
    arena.free(extents)
    with pytest.raises(InternalError, match="not an extent in use"):
        arena.free(extents)
    assert arena.free_size == arena.capacity


class ArenaMachine(RuleBasedStateMachine):
    """Any order of allocations and frees keeps the arena whole, and no element is given out twice."""

    live: Bundle[tuple[Extent, ...]] = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(64 * ALIGNMENT)
        self.owned: set[int] = set()

    @rule(target=live, blocks=st.lists(st.integers(1, 9), min_size=1, max_size=12))
    def allocate(self, blocks: list[int]) -> object:
        ends = ends_of(blocks)
        extents = self.arena.allocate(ends)
        if extents is None:
            # All or nothing; and with room for every block in whatever order, only fragmentation may refuse.
            assert ends[-1] > self.arena.free_size or self.owned
            return multiple()
        assert sum(extent.size for extent in extents) == ends[-1]
        borders = {0}
        for extent in extents:
            borders.add(max(borders) + extent.size)
            units = set(range(extent.start // ALIGNMENT, extent.end // ALIGNMENT))
            assert not units & self.owned
            self.owned |= units
        assert borders <= {0, *ends}
        return extents

    @rule(extents=consumes(live))
    def free(self, extents: tuple[Extent, ...]) -> None:
        self.arena.free(extents)
        for extent in extents:
            self.owned -= set(range(extent.start // ALIGNMENT, extent.end // ALIGNMENT))

    @invariant()
    def whole(self) -> None:
        self.arena.check()
        assert self.arena.used_size == len(self.owned) * ALIGNMENT


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
