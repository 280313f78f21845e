"""The cost curves' points: what grows, what stays, and the engine cores that are stepped."""

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
import synthetic
from engine_core import WARM_STEPS, BenchEngine, Streams
from measure import median_ratio
from peftserve.adapters.blobs import adapters_root
from peftserve.adapters.store import AdapterStore
from peftserve.model.config_reader import read_spec
from peftserve.model.spec import ModelSpec, targets
from peftserve.types import AdapterRef
from peftserve_kernels import RANK_PAGE_ROWS, rank_pages
from synthetic import TENANT

_PAGE_SIZE = 16
_HOST_BYTES = 8 * 2**30  # a bound, not an allocation
_LOOKUPS = 32
_CHURN = 4  # times as many steps: the engine reports residency four times a second


@dataclass(frozen=True, slots=True)
class Sizes:
    """The points of each curve, and what they have in common."""

    rounds: int
    steps: int
    streams: int
    prompt_tokens: int
    distinct: tuple[int, ...]
    distinct_rank: int
    ranks: tuple[int, ...]
    adapters_per_rank: int
    contexts: tuple[int, ...]
    context_streams: int
    registered: tuple[int, ...]
    registered_used: int
    max_rank: int


def full_sizes(rounds: int, context_streams: int) -> Sizes:
    """The curves that the README shows."""
    return Sizes(
        rounds=rounds,
        steps=16,
        streams=32,
        prompt_tokens=80,
        distinct=(0, 1, 2, 4, 8, 16, 32),
        distinct_rank=8,
        ranks=(0, 4, 8, 16, 32, 64),
        adapters_per_rank=4,
        contexts=(128, 512, 1024, 2048, 4096, 8192),
        context_streams=context_streams,
        registered=(10, 100, 1000, 10_000),
        registered_used=8,
        max_rank=64,
    )


QUICK = Sizes(
    rounds=2,
    steps=3,
    streams=6,
    prompt_tokens=10,
    distinct=(0, 1, 3, 6),
    distinct_rank=3,
    ranks=(0, 2, 12),
    adapters_per_rank=2,
    contexts=(32, 100, 10_000),
    context_streams=2,
    registered=(3, 8),
    registered_used=2,
    max_rank=16,
)


@dataclass(slots=True)
class Curve:
    """Step times in milliseconds by x: one value a round. `findings` are what the curve shows, as numbers."""

    name: str
    title: str
    x_label: str
    rounds_ms: dict[int, list[float]] = field(default_factory=dict)
    findings: dict[str, float] = field(default_factory=dict)

    def medians(self) -> list[float]:
        return [statistics.median(values) for values in self.rounds_ms.values()]

    def over(self, x: int, baseline: int) -> float:
        """The step at `x` in units of the step at `baseline`."""
        return median_ratio(self.rounds_ms[x], self.rounds_ms[baseline])

    def document(self) -> dict[str, Any]:
        points = [
            {"x": x, "ms": statistics.median(values), "rounds_ms": values} for x, values in self.rounds_ms.items()
        ]
        return {"name": self.name, "title": self.title, "x": self.x_label, "points": points, "findings": self.findings}


class StepCurves:
    """What all curves need: a checkpoint, a folder for adapters, and the sizes."""

    def __init__(self, checkpoint: Path, folder: Path, sizes: Sizes, threads: int) -> None:
        self.spec: ModelSpec = read_spec(checkpoint)
        self._checkpoint = checkpoint
        self._folder = folder
        self._sizes = sizes
        self._threads = threads
        self._random = random.Random(0)

    def distinct(self) -> Curve:
        """Streams spread over ever more adapters; 0 is the bare base."""
        sizes = self._sizes
        title = f"{sizes.streams} streams on LoRAs of rank {sizes.distinct_rank}"
        curve = Curve("distinct", title, "distinct adapters")
        data_dir = self._folder / "distinct"
        with closing(self._store(data_dir)) as store:
            refs = [self._lora(store, sizes.distinct_rank, seed) for seed in range(max(sizes.distinct))]
        prompts = self._prompts(sizes.streams)
        kv_bytes = self._kv_bytes(len(sizes.distinct), sizes.streams, sizes.prompt_tokens)
        loras = [sizes.distinct_rank] * len(refs)
        with closing(self._engine(data_dir, loras=loras, kv_cache_bytes=kv_bytes)) as engine:
            points = {count: _shared_out(prompts, refs[:count]) for count in sizes.distinct}
            self._run(curve, {count: (engine, streams) for count, streams in points.items()})
        first, last = sizes.distinct[1], sizes.distinct[-1]
        curve.findings = {
            f"{last} adapters over {first}": curve.over(last, first),
            f"{last} adapters over none": curve.over(last, 0),
        }
        return curve

    def ranks(self) -> Curve:
        """Streams on a few adapters of ever larger rank; 0 is the bare base."""
        sizes = self._sizes
        curve = Curve("ranks", f"{sizes.streams} streams on {sizes.adapters_per_rank} LoRAs of one rank", "rank")
        data_dir = self._folder / "ranks"
        loras = [rank for rank in sizes.ranks if rank for _ in range(sizes.adapters_per_rank)]
        with closing(self._store(data_dir)) as store:
            refs = {
                rank: [self._lora(store, rank, seed) for seed in range(sizes.adapters_per_rank if rank else 0)]
                for rank in sizes.ranks
            }
        prompts = self._prompts(sizes.streams)
        kv_bytes = self._kv_bytes(len(sizes.ranks), sizes.streams, sizes.prompt_tokens)
        with closing(self._engine(data_dir, loras=loras, kv_cache_bytes=kv_bytes)) as engine:
            self._run(curve, {rank: (engine, _shared_out(prompts, refs[rank])) for rank in sizes.ranks})
        first, last = sizes.ranks[1], sizes.ranks[-1]
        curve.findings = {
            f"rank {last} over rank {first}": curve.over(last, first),
            f"rank {last} over none": curve.over(last, 0),
        }
        return curve

    def context(self, read_bytes_per_s: float) -> Curve:
        """Streams of the bare base with ever longer contexts, each with K and V of its own."""
        sizes = self._sizes
        curve = Curve("context", f"{sizes.context_streams} streams of the bare base", "tokens of context")
        # Steps are timed on both sides of the context that they stand for.
        before = WARM_STEPS + sizes.steps // 2 + 1
        longest = self.spec.max_position_embeddings - sizes.steps
        contexts = tuple(sorted({min(context, longest) for context in sizes.contexts}))
        kv_bytes = self._kv_bytes(1, sizes.context_streams, longest)
        # A stream's shorter prompts are beginnings of its longest, so that each is prefilled once.
        whole = self._prompts(sizes.context_streams, longest)
        with closing(self._engine(self._folder / "context", loras=(), kv_cache_bytes=kv_bytes)) as engine:
            points = {context: [(prompt[: context - before], None) for prompt in whole] for context in contexts}
            self._run(curve, {context: (engine, streams) for context, streams in points.items()})
        fit = statistics.linear_regression(contexts, curve.medians())
        token_bytes = sizes.context_streams * self.spec.kv_page_bytes(1, 2)
        curve.findings = {
            "ms without context": fit.intercept,
            "ms per 1000 tokens": 1000 * fit.slope,
            "ms per 1000 tokens to read K and V": 1e6 * token_bytes / read_bytes_per_s,
            "correlation with a line": statistics.correlation(contexts, curve.medians()),
        }
        return curve

    def registered(self) -> tuple[Curve, Curve, Curve]:
        """Ever more tiny adapters in the store and on the engine's host tier, a few of them used.

        Steps that only decode; steps at each of which a request ends and another begins, as means, so that what happens
        now and then counts too; and looking a name up.
        """
        sizes = self._sizes
        title = f"{sizes.streams} streams on {sizes.registered_used} adapters"
        curve = Curve("registered", title, "registered adapters")
        churn = Curve("churn", f"{title}, one request replaced at each step", "registered adapters")
        lookup = Curve("lookup", "resolving an adapter's name in the store", "registered adapters")
        data_dir = self._folder / "registered"
        refs: list[AdapterRef] = []
        with closing(self._store(data_dir)) as store:
            for count in sizes.registered:
                began = time.perf_counter()
                refs += [self._tiny(store, number) for number in range(len(refs), count)]
                report.progress.print(f"{count} adapters registered, the last in {time.perf_counter() - began:.1f} s")
                names = self._random.choices([ref.name for ref in refs], k=_LOOKUPS * sizes.rounds)
                lookup.rounds_ms[count] = [
                    1000 * statistics.median(_resolve_s(store, name) for name in names[at : at + _LOOKUPS])
                    for at in range(0, len(names), _LOOKUPS)
                ]
        prompts = self._prompts(sizes.streams)
        streams = _shared_out(prompts, refs[: sizes.registered_used])
        # A core for each point, as a core cannot forget.
        with ExitStack() as stack:
            engines = {}
            for count in sizes.registered:
                engine = self._engine(data_dir, loras=[1] * sizes.registered_used, adapter_host_bytes=_HOST_BYTES)
                engines[count] = stack.enter_context(closing(engine))
                engine.prefetch(refs[:count])
            self._run(curve, {count: (engine, streams) for count, engine in engines.items()})
            for _ in range(sizes.rounds):
                for count, engine in engines.items():
                    seconds = engine.churn_s(streams, _CHURN * sizes.steps)
                    churn.rounds_ms.setdefault(count, []).append(1000 * statistics.fmean(seconds))
        first, last = sizes.registered[0], sizes.registered[-1]
        for each in (curve, churn, lookup):
            each.findings = {f"{last} registered over {first}": each.over(last, first)}
        return curve, churn, lookup

    def _run(self, curve: Curve, points: dict[int, tuple[BenchEngine, Streams]]) -> None:
        for turn in range(self._sizes.rounds):
            for x, (engine, streams) in points.items():
                ms = 1000 * statistics.median(engine.decode_s(streams, self._sizes.steps))
                curve.rounds_ms.setdefault(x, []).append(ms)
                report.progress.print(f"{curve.name}, round {turn + 1}, {curve.x_label} = {x}: {ms:.2f} ms")

    def _engine(self, data_dir: Path, *, loras: Sequence[int], **settings: object) -> BenchEngine:
        """An engine with room on the device for LoRAs of these ranks on all projections."""
        return BenchEngine(
            self._checkpoint,
            data_dir,
            threads=self._threads,
            adapter_device_bytes=_lora_bytes(self.spec, loras),
            max_adapter_rank=max(loras, default=1),
            **settings,
        )

    def _kv_bytes(self, points: int, streams: int, tokens: int) -> int:
        """Room for the prompts of all points to stay in the prefix cache."""
        answer = 2 * (WARM_STEPS + self._sizes.steps) + streams
        pages = points * streams * (-(-(tokens + answer) // _PAGE_SIZE) + 1)
        return pages * self.spec.kv_page_bytes(_PAGE_SIZE, 2)

    def _store(self, data_dir: Path) -> AdapterStore:
        return AdapterStore(adapters_root(data_dir), self.spec, max_rank=self._sizes.max_rank)

    def _lora(self, store: AdapterStore, rank: int, seed: int) -> AdapterRef:
        return synthetic.publish(store, f"lora-r{rank}-{seed}", synthetic.lora(self.spec, rank, seed=seed))

    def _tiny(self, store: AdapterStore, number: int) -> AdapterRef:
        files = synthetic.lora(self.spec, 1, seed=number, modules=("q_proj",), layers=(0,))
        return synthetic.publish(store, f"tiny-{number}", files)

    def _prompts(self, count: int, length: int | None = None) -> list[list[int]]:
        ids = range(self.spec.vocab_size)
        return [self._random.choices(ids, k=length or self._sizes.prompt_tokens) for _ in range(count)]


def _shared_out(prompts: Sequence[Sequence[int]], refs: Sequence[AdapterRef]) -> Streams:
    """Every prompt with an adapter, in turns; with the bare base when there is none."""
    return [(prompt, refs[at % len(refs)] if refs else None) for at, prompt in enumerate(prompts)]


def _lora_bytes(spec: ModelSpec, ranks: Sequence[int]) -> int:
    """Device bytes for LoRAs of these ranks on all projections, bf16, with some room to spare."""
    features = spec.num_layers * sum(target.in_features + target.out_features for target in targets(spec))
    rows = RANK_PAGE_ROWS * sum(rank_pages(rank) for rank in ranks)
    return 2**22 + int(1.25 * 2 * rows * features)


def _resolve_s(store: AdapterStore, name: str) -> float:
    began = time.perf_counter()
    store.resolve(TENANT, name)
    return time.perf_counter() - began
