"""Steps captured once and replayed without Python between their ops: tapes of native calls on the CPU, CUDA graphs on a
GPU.

A captured step holds for any mix of requests and adapters: segments, slots and page tables are data at fixed addresses
(`static_batch`). On the CPU a tape also holds for any number of tokens and rows, so that every step is a replay. On a
GPU decode steps are, one token a row: a few sizes are captured before the first request, and a step takes the next
larger one.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from peftserve.engine.plan import StepPlan
from peftserve.errors import InternalError
from peftserve.model.batch import Batch
from peftserve.model.static_batch import StaticBatch
from peftserve_kernels.cpu.extension import HAS_NATIVE
from peftserve_kernels.cpu.tape import Tape, TapeMemory
from peftserve_kernels.dispatch import Backend, backend_for


class Model(Protocol):
    """What is captured; `model.decoder.Decoder` is it."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """The residual stream [tokens, hidden]."""

    def logits(self, stream: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Logits float32 [rows, vocab] of rows of the stream, None for all."""

    def step(self, batch: Batch) -> torch.Tensor:
        """Both: the logits of the batch's rows that sample."""


class StepGraphs(Protocol):
    """Captured steps."""

    def holds(self, plan: StepPlan) -> bool:
        """Whether `run` can run it."""

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits float32 [B, vocab] of the rows that sample, in the plan's order, valid until the next run."""


def is_decode(plan: StepPlan) -> bool:
    """Whether every row computes one token and samples after it."""
    return all(row.num_tokens == 1 and row.sample is not None for row in plan.rows)


def make_graphs(
    model: Model, device: torch.device, *, max_tokens: int, max_rows: int, max_context: int, page_size: int
) -> StepGraphs | None:
    """The way to capture steps of up to `max_tokens` tokens of `max_rows` sequences on `device`; None for 0 rows, and
    where there is none (the torch references)."""

    def inputs(tokens: int) -> StaticBatch:
        return StaticBatch(
            max_tokens=tokens, max_rows=max_rows, max_context=max_context, page_size=page_size, device=device
        )

    if not max_rows:
        return None
    if backend_for(device) is Backend.CPU and HAS_NATIVE:
        return TapeGraphs(model, inputs(max_tokens))
    if backend_for(device) is Backend.TRITON and device.type == "cuda":
        return CudaGraphs(model, inputs(max_rows), device)
    return None


@dataclass(frozen=True, slots=True)
class _Recorded:
    tape: Tape
    logits: torch.Tensor  # of as many rows as there can be


class TapeGraphs:
    """Native calls on the CPU: four tapes, with and without adapters of each kind, recorded when they are needed."""

    def __init__(self, model: Model, inputs: StaticBatch) -> None:
        self._model = model
        self._inputs = inputs
        self._memory = TapeMemory()
        self._steps: dict[tuple[bool, bool], _Recorded] = {}

    def holds(self, plan: StepPlan) -> bool:
        """See `StepGraphs`: every step of the sizes that the inputs are for."""
        return self._inputs.holds(plan)

    def run(self, plan: StepPlan) -> torch.Tensor:
        """See `StepGraphs`."""
        sampled = self._inputs.load(plan)
        kinds = bool(plan.lora.slot), bool(plan.bottleneck.slot)
        if (step := self._steps.get(kinds)) is None:
            step = self._steps[kinds] = self._record(*kinds)
        step.tape.replay(plan.num_tokens, len(plan.rows), sampled)
        return step.logits[:sampled]

    def _record(self, lora: bool, bottleneck: bool) -> _Recorded:
        tape = Tape(self._memory)
        batch = self._inputs.view(lora=lora, bottleneck=bottleneck)
        with tape.recording():
            stream = self._model.forward(batch)
        with tape.recording(sampled=True):
            logits = self._model.logits(stream, batch.sample_rows)
        return _Recorded(tape, self._memory.keep(logits))


# Sizes captured on a GPU: small steps exactly, larger ones with at most a quarter of padding.
_SIZES: Final = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows to capture a step for: the last one is `max_rows`, or 256 when that is more."""
    largest = min(max_rows, _SIZES[-1])
    return (*(size for size in _SIZES if size < largest), largest)


def size_for(rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the ascending `sizes` that holds `rows`; None when none does."""
    at = bisect.bisect_left(sizes, rows)
    return sizes[at] if at < len(sizes) else None


class CudaGraphs:
    """One CUDA graph for each size, bare and with adapters of both kinds; a batch without one kind launches it idle."""

    def __init__(self, model: Model, inputs: StaticBatch, device: torch.device) -> None:
        self._model = model
        self._inputs = inputs
        self._sizes = graph_sizes(inputs.max_rows)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._logits: torch.Tensor | None = None  # of all graphs, for each with its own would keep hundreds of MB
        pool = torch.cuda.graph_pool_handle()
        inputs.load(StepPlan(0, ()), inputs.max_rows)
        # The largest first: the others then find its memory in the pool.
        for size in reversed(self._sizes):
            for adapters in (True, False):
                self._graphs[size, adapters] = self._capture(size, adapters, pool, device)

    def holds(self, plan: StepPlan) -> bool:
        """See `StepGraphs`: steps that decode."""
        return len(plan.rows) <= self._inputs.max_rows and is_decode(plan)

    def run(self, plan: StepPlan) -> torch.Tensor:
        """See `StepGraphs`. A step larger than all graphs runs op by op."""
        rows = len(plan.rows)
        size = size_for(rows, self._sizes)
        adapters = bool(plan.lora.slot or plan.bottleneck.slot)
        self._inputs.load(plan, size or rows)
        if size is None:
            return self._model.step(self._inputs.decode_view(rows, lora=adapters, bottleneck=adapters))
        self._graphs[size, adapters].replay()
        if self._logits is None:
            raise InternalError("no decode step has been captured")
        return self._logits[:rows]

    def _capture(self, size: int, adapters: bool, pool: Any, device: torch.device) -> torch.cuda.CUDAGraph:
        batch = self._inputs.decode_view(size, lora=adapters, bottleneck=adapters)
        # Compiles the kernels and fills the libraries' workspaces, which must not happen inside the capture.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            logits = self._model.step(batch)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._logits[:size].copy_(self._model.step(batch))
        return graph
