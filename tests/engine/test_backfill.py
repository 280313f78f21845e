"""Who may start before a request that has starved for KV pages."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from peftserve.engine.backfill import Backfill, Bounds
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.request import Request
from peftserve.types import EngineRequest

from .harness import Harness
from .simulator import request

PAGE = 4
BOUNDS = Bounds(max_batch_tokens=16, max_model_len=64)


def waiting(prompt: int, max_tokens: int) -> Request:
    return Request(request(f"{prompt}-{max_tokens}", [1] * prompt, max_tokens=max_tokens), seed=0)


def running(kv: KvPageManager, prompt: int, max_tokens: int) -> Request:
    """One that has computed its prompt and sampled once."""
    made = waiting(prompt, max_tokens)
    pages = kv.allocate(kv.pages_for(prompt))
    assert pages is not None
    made.block_table, made.num_computed = pages, prompt
    made.append(7)
    return made


def test_who_ends_in_time_or_fits_beside_may_start() -> None:
    kv = KvPageManager(10, PAGE)
    # They hold two and four pages, for 9 and for 24 steps; eight are there when the second has ended.
    both = [running(kv, 8, 10), running(kv, 16, 25)]
    room = Backfill.beside(waiting(32, 1), both, kv, BOUNDS)
    assert room is not None
    assert (room.steps, room.spare) == (24, 2)
    assert room.take(waiting(4, 24))  # ends in time
    assert not room.take(waiting(4, 25))  # eight pages at its end
    assert room.take(waiting(16, 23))  # a step for its prompt
    assert not room.take(waiting(16, 24))
    small = Backfill(steps=2, spare=2, kv=kv, bounds=BOUNDS)
    assert small.take(waiting(4, 3))
    assert not small.take(waiting(4, 3)), "two of two pages are taken"
    assert small.take(waiting(4, 2))


def test_nobody_where_the_pages_will_never_be_there() -> None:
    kv = KvPageManager(10, PAGE)
    assert kv.allocate(4) is not None  # pinned prefixes
    assert Backfill.beside(waiting(28, 1), [running(kv, 8, 9)], kv, BOUNDS) is None


@dataclass(frozen=True, slots=True)
class Arrival:
    step: int
    prompt: int
    max_tokens: int


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 40))
ARRIVALS = st.lists(st.builds(Arrival, st.integers(0, 40), st.integers(1, 6), st.integers(1, 40)), max_size=12)


def steps_until_it_starts(sizes: list[tuple[int, int]], large: int, arrivals: list[Arrival]) -> tuple[int, int]:
    """Of a request with a prompt of `large` tokens that comes when others run; and how many arrivals ended before."""
    h = Harness(num_pages=24, max_batch_tokens=256, max_num_seqs=6, starvation_s=0.5, prefix_caching=False)
    for index, (prompt, max_tokens) in enumerate(sizes):
        h.add(request(f"first-{index}", [1] * prompt, max_tokens=max_tokens, tenant=f"first-{index}"))
    h.step()
    h.add(request("large", [2] * large, max_tokens=2, tenant="large"))
    for _ in range(7):  # until it has starved, if it has to wait
        h.step()
    specs: list[EngineRequest] = []
    for step in range(200):
        if h.events["large"]:
            break
        for arrival in (a for a in arrivals if a.step == step):
            name = f"late-{len(specs)}"
            specs.append(request(name, [3] * arrival.prompt, max_tokens=arrival.max_tokens, tenant=name))
            h.add(specs[-1])
        h.step()
    done = sum(h.finished(spec.id) for spec in specs)
    h.run()
    h.check_idle()
    return step, done


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), large=st.integers(40, 62), arrivals=ARRIVALS)
def test_nobody_delays_who_has_starved(sizes: list[tuple[int, int]], large: int, arrivals: list[Arrival]) -> None:
    alone, _ = steps_until_it_starts(sizes, large, [])
    beside_others, _ = steps_until_it_starts(sizes, large, arrivals)
    assert beside_others <= alone


def test_short_ones_are_served_meanwhile() -> None:
    sizes = [(12, 50), (12, 50), (12, 50), (12, 50)]
    arrivals = [Arrival(step, 2, 3) for step in range(8)]
    step, done = steps_until_it_starts(sizes, 62, arrivals)
    assert (step, done) == (steps_until_it_starts(sizes, 62, [])[0], 8)
