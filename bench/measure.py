"""Timing: variants take turns (A B A B ...), so that a change in the machine's load hits all of them alike.

Ratios are formed within a round, of neighbours in time, and only then reduced to their median.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Call = Callable[[], object]
Timer = Callable[[Call, int], float]
"""Seconds a call, of so many calls."""
Rounds = Mapping[str, Sequence[float]]
"""One value a round, by variant."""

# Longer than OpenMP's threads spin for more work.
_QUIET_S = 0.02


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: `rounds` turns of each variant, each of at least `turn_s` seconds."""

    rounds: int
    turn_s: float


def interleave(variants: Mapping[str, Call], effort: Effort, timer: Timer | None = None) -> dict[str, list[float]]:
    """Seconds per call, one value a round; by the host's clock unless `timer` has another."""
    timer = timer or _time
    calls = {name: _calls_in(effort.turn_s, call, timer) for name, call in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(effort.rounds):
        for name, call in variants.items():
            seconds[name].append(timer(call, calls[name]))
    return seconds


def rotating(items: Sequence[T], call: Callable[[T], object]) -> Call:
    """Calls `call` with the next item each time: with enough of them, none is in the cache any more."""
    source = itertools.cycle(items)
    return lambda: call(next(source))


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far the rounds disagree."""
    return (max(values) - min(values)) / statistics.median(values)


def _calls_in(turn_s: float, call: Call, timer: Timer) -> int:
    count = 1
    while (elapsed := timer(call, count) * count) < turn_s / 4:
        count *= 2
    return max(1, round(count * turn_s / elapsed))


def _time(call: Call, count: int) -> float:
    time.sleep(_QUIET_S)  # the threads of the variant before stop looking for work
    call()  # pays for what it left behind: caches full of its data
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count
