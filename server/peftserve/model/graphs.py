"""Decode steps captured once and replayed without Python between their ops: tapes of native calls on the CPU, CUDA
graphs on a GPU.

A captured step holds for any mix of requests and adapters: segments, slots and page tables are data at fixed addresses
(`decode_batch`). On the CPU a step is captured for its exact number of rows, at its first occurrence, which costs
nothing. On a GPU a few sizes are captured before the first request, and a step takes the next larger one.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from peftserve.engine.plan import StepPlan
from peftserve.errors import InternalError
from peftserve.model.batch import Batch
from peftserve.model.decode_batch import DecodeBatch
from peftserve_kernels.cpu.extension import HAS_NATIVE
from peftserve_kernels.cpu.tape import Tape, TapeMemory
from peftserve_kernels.dispatch import Backend, backend_for


class Model(Protocol):
    """What is captured; `model.decoder.Decoder` is it."""

    def step(self, batch: Batch) -> torch.Tensor:
        """Logits float32 [rows, vocab] of the rows that sample."""


class StepGraphs(Protocol):
    """Captured decode steps."""

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits float32 [rows, vocab] in the plan's order, valid until the next run. The plan must be `is_decode`."""


def is_decode(plan: StepPlan) -> bool:
    """Whether every row computes one token and samples after it."""
    return all(row.num_tokens == 1 and row.sample is not None for row in plan.rows)


def make_graphs(model: Model, inputs: DecodeBatch, device: torch.device) -> StepGraphs | None:
    """The way to capture steps on `device`; None where there is none (the torch references)."""
    backend = backend_for(device)
    if backend is Backend.CPU and HAS_NATIVE:
        return TapeGraphs(model, inputs)
    if backend is Backend.TRITON and device.type == "cuda":
        return CudaGraphs(model, inputs, device)
    return None


@dataclass(frozen=True, slots=True)
class _Key:
    """What a captured step depends on."""

    rows: int
    lora: bool
    bottleneck: bool


@dataclass(frozen=True, slots=True)
class _Recorded:
    tape: Tape
    logits: torch.Tensor


class TapeGraphs:
    """Native calls on the CPU."""

    def __init__(self, model: Model, inputs: DecodeBatch) -> None:
        self._model = model
        self._inputs = inputs
        self._memory = TapeMemory()
        self._steps: dict[_Key, _Recorded] = {}

    def run(self, plan: StepPlan) -> torch.Tensor:
        """See `StepGraphs`."""
        rows = len(plan.rows)
        self._inputs.load(plan, rows)
        key = _Key(rows, lora=bool(plan.lora.slot), bottleneck=bool(plan.bottleneck.slot))
        if (step := self._steps.get(key)) is None:
            step = self._steps[key] = self._record(key)
        else:
            step.tape.replay()
        return step.logits

    def _record(self, key: _Key) -> _Recorded:
        """Runs the step, too."""
        tape = Tape(self._memory)
        batch = self._inputs.view(key.rows, lora=key.lora, bottleneck=key.bottleneck)
        with tape.recording():
            logits = self._model.step(batch)
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

    def __init__(self, model: Model, inputs: DecodeBatch, device: torch.device) -> None:
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

    def run(self, plan: StepPlan) -> torch.Tensor:
        """See `StepGraphs`. A step larger than all graphs runs op by op."""
        rows = len(plan.rows)
        size = size_for(rows, self._sizes)
        adapters = bool(plan.lora.slot or plan.bottleneck.slot)
        self._inputs.load(plan, size or rows)
        if size is None:
            return self._model.step(self._inputs.view(rows, lora=adapters, bottleneck=adapters))
        self._graphs[size, adapters].replay()
        if self._logits is None:
            raise InternalError("no decode step has been captured")
        return self._logits[:rows]

    def _capture(self, size: int, adapters: bool, pool: Any, device: torch.device) -> torch.cuda.CUDAGraph:
        batch = self._inputs.view(size, lora=adapters, bottleneck=adapters)
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
