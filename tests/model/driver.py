"""A scheduler small enough to be obviously right: plans with fixed block tables, driving the real `Runner`.

All jobs run together from the first step; each step gives every unfinished job its next prompt chunk or its next token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftserve.adapters.store import AdapterStore
from peftserve.engine.adapter_memory import HostAdapter, Placement
from peftserve.engine.plan import PageCopy, Row, Sampled, SampleSpec, StepPlan, count_tokens, segments
from peftserve.model.adapter_memory import DeviceAdapterMemory
from peftserve.model.config_reader import read_spec
from peftserve.model.kv import KvCache
from peftserve.model.runner import Runner
from peftserve.model.weights import load_weights
from peftserve.types import AdapterKind, AdapterRef, SamplingParams

GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0, logprobs=20)
_KINDS = list(AdapterKind)
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Placed:
    """An adapter on the device."""

    host: HostAdapter
    placement: Placement


@dataclass(slots=True)
class Job:
    """One sequence: `num_tokens` tokens after `prompt`. `forced` tokens are fed instead of the sampled ones.

    `chunks` cuts the prompt: sizes of the first chunks, the rest in one. After the run `sampled` holds what was picked.
    """

    prompt: Sequence[int]
    num_tokens: int = 1
    adapter: Placed | None = None
    forced: Sequence[int] = ()
    params: SamplingParams = GREEDY
    seed: int = 0
    chunks: Sequence[int] = ()
    sampled: list[Sampled] = field(default_factory=list)
    _fed: list[int] = field(default_factory=list)
    _computed: int = 0
    _table: list[int] = field(default_factory=list)
    _copy: PageCopy | None = None
    _steps: int = 0

    @property
    def token_ids(self) -> list[int]:
        """The tokens that were picked."""
        return [pick.token_id for pick in self.sampled]

    @property
    def done(self) -> bool:
        return len(self.sampled) >= self.num_tokens

    @property
    def kind(self) -> AdapterKind:
        return self.adapter.host.kind if self.adapter else AdapterKind.BASE

    @property
    def slot(self) -> int:
        return self.adapter.placement.slot if self.adapter else 0

    @property
    def virtual(self) -> int:
        return self.adapter.host.num_virtual_tokens if self.adapter else 0


class Driver:
    """A model in `folder` with its caches, in `dtype`; adapters in `adapter_dtype`, as `DeviceAdapterMemory` takes it.

    Pages are handed out in a shuffled order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        page_size: int = 4,
        num_pages: int = 512,
        max_context: int = 512,
        store: Path | None = None,
        arena_bytes: int = 1 << 27,
        num_slots: int = 16,
        max_rank: int = 64,
        max_tokens: int = 512,
        max_rows: int = 64,
        adapter_dtype: torch.dtype | None = None,
        int8_activations: bool = False,
    ) -> None:
        self.spec = read_spec(folder)
        self.kv = KvCache(self.spec, num_pages=num_pages, page_size=page_size, dtype=dtype, device=_CPU)
        weights = load_weights(folder, self.spec, dtype, _CPU)
        self.memory = DeviceAdapterMemory(
            self.spec,
            self.kv,
            root=store or folder,
            arena_bytes=arena_bytes,
            num_slots=num_slots,
            max_rank=max_rank,
            dtype=adapter_dtype,
            base=weights,
            int8_activations=int8_activations,
        )
        self._store = AdapterStore(store, self.spec, max_rank=max_rank) if store else None
        self.runner = Runner(
            weights,
            self.spec,
            self.kv,
            self.memory,
            max_context=max_context,
            max_tokens=max_tokens,
            max_rows=max_rows,
            int8_activations=int8_activations,
        )
        self._page_size = page_size
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)
        self._step = 0

    def publish(self, folder: Path) -> AdapterRef:
        """Put the adapter in `folder` (as PEFT or AdapterHub saved it) into the store."""
        if self._store is None:
            raise RuntimeError("this driver has no store")
        (weights,) = folder.glob("adapter*.safetensors")
        with self._store.new_upload("tests", folder.name.replace("_", "-").lower()) as upload:
            upload.write_config((folder / "adapter_config.json").read_bytes())
            upload.write_weights(weights.read_bytes())
            return upload.commit().ref

    def add(self, folder: Path) -> Placed:
        """From the files in `folder` to the device: store, load, place."""
        return self.place(self.memory.load(self.publish(folder)))

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()

    def place(self, host: HostAdapter) -> Placed:
        """Bring a loaded adapter to the device, as the adapter cache would."""
        if host.kind is AdapterKind.PREFIX:
            placement: Placement | None = Placement(pages=tuple(self._pages(host.num_virtual_tokens)))
        else:
            placement = self.memory.reserve(host)
        if placement is None:
            raise RuntimeError("no room for the adapter")
        self.memory.copy(host, placement)
        return Placed(host, placement)

    def remove(self, placed: Placed) -> None:
        """Give an adapter's place back."""
        if placed.placement.pages:
            self._free += placed.placement.pages
        else:
            self.memory.release(placed.placement, placed.host.kind)

    def run(self, *jobs: Job) -> list[list[int]]:
        """Run all jobs to their end; returns their tokens."""
        for job in jobs:
            self._start(job)
        while not all(job.done for job in jobs):
            self._execute(sorted((job for job in jobs if not job.done), key=_batch_order))
        for job in jobs:
            self._free += job._table[job.virtual // self._page_size :]
        return [job.token_ids for job in jobs]

    def _start(self, job: Job) -> None:
        shared = job.adapter.placement.pages if job.adapter else ()
        full, rest = divmod(job.virtual, self._page_size)
        total = job.virtual + len(job.prompt) + job.num_tokens
        own = self._pages(total - full * self._page_size)
        job._table = [*shared[:full], *own]
        job._computed = job.virtual
        job._copy = PageCopy(shared[full], own[0], rest) if rest else None
        job._fed = list(job.prompt)

    def _execute(self, jobs: Sequence[Job]) -> None:
        self._step += 1
        rows = tuple(self._row(job) for job in jobs)
        copies = tuple(job._copy for job in jobs if job._copy)
        plan = StepPlan(
            self._step, rows, copies, segments(rows, AdapterKind.LORA), segments(rows, AdapterKind.BOTTLENECK)
        )
        result = self.runner.execute(plan)
        assert result.step == self._step
        assert result.sampled.keys() == {row.request_id for row in rows if row.sample}
        for job, row in zip(jobs, rows, strict=True):
            job._copy = None
            job._computed += row.num_tokens
            job._steps += 1
            if row.sample:
                pick = result.sampled[row.request_id]
                job.sampled.append(pick)
                position = len(job.sampled) - 1
                forced = position < len(job.forced)
                job._fed.append(job.forced[position] if forced else pick.token_id)

    def _row(self, job: Job) -> Row:
        pending = job._fed[job._computed - job.virtual :]
        if job._steps < len(job.chunks):
            pending = pending[: job.chunks[job._steps]]
        reaches_end = job._computed - job.virtual + len(pending) == len(job._fed)
        output = job._fed[len(job.prompt) :]
        counts = count_tokens(job.prompt, output) if job.params.counts_tokens else None
        return Row(
            request_id=str(id(job)),
            kind=job.kind,
            slot=job.slot,
            token_ids=pending,
            num_computed=job._computed,
            block_table=job._table,
            sample=SampleSpec(job.params, job.seed, len(output), counts) if reaches_end else None,
        )

    def _pages(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // self._page_size)
        taken, self._free = self._free[:count], self._free[count:]
        if len(taken) < count:
            raise RuntimeError("out of KV pages")
        return taken


def _batch_order(job: Job) -> tuple[int, int]:
    return _KINDS.index(job.kind), job.slot
