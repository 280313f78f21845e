"""The step loop: schedule, execute, commit. Knows nothing of processes, sockets or torch."""

import time
from typing import Protocol

from peftserve.engine.adapter_cache import AdapterCache
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.messages import (
    AbortRequest,
    AddRequest,
    Command,
    EngineStats,
    PrefetchAdapter,
    StepUpdate,
    UnloadAdapter,
)
from peftserve.engine.plan import StepPlan, StepResult
from peftserve.engine.scheduler import Scheduler
from peftserve.errors import InternalError
from peftserve.log import get_logger

log = get_logger(__name__)


class Runner(Protocol):
    """Whatever executes a plan; `model.runner.Runner` is it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the plan's rows through the model."""


class EngineCore:
    """One engine: its scheduler, its caches and its runner. Single-threaded; only `AdapterCache` has helpers."""

    def __init__(self, scheduler: Scheduler, kv: KvPageManager, adapters: AdapterCache, runner: Runner) -> None:
        self.scheduler = scheduler
        self.kv = kv
        self.adapters = adapters
        self.runner = runner
        self.failed_steps = 0  # one after the other, up to now

    def handle(self, command: Command) -> None:
        """Apply what the front end asked for; takes effect with the next step."""
        match command:
            case AddRequest(request=request):
                self.scheduler.add(request)
            case AbortRequest(request_id=request_id):
                self.scheduler.abort(request_id)
            case PrefetchAdapter(adapter=adapter, pinned=pinned):
                self.adapters.prefetch(adapter, pinned=pinned)
            case UnloadAdapter(digest=digest):
                self.adapters.unload(digest)

    def step(self) -> StepUpdate:
        """One turn. Without rows to run it only reports what else happened (loads, failures, aborts)."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        result = self._execute(plan) if plan.rows else None
        events = self.scheduler.commit(plan, result)
        changed, gone = self.adapters.take_changes()
        return StepUpdate(
            events=events,
            stats=self._stats(plan.step),
            step_s=time.perf_counter() - started,
            num_batch_tokens=plan.num_tokens,
            residency=changed,
            gone=gone,
        )

    @property
    def is_busy(self) -> bool:
        """Whether another step may do something without a new command or a loaded adapter."""
        return bool(self.scheduler.running) or self.scheduler.has_events

    def _execute(self, plan: StepPlan) -> StepResult | None:
        try:
            result = self.runner.execute(plan)
            self.failed_steps = 0
            return result
        except Exception:
            self.failed_steps += 1
            # The pages that the step was writing were never published, so the caches are sound: only its requests end.
            log.exception("step failed", step=plan.step, rows=len(plan.rows))
            error = InternalError(f"step {plan.step} failed in the engine; the server's log has the cause")
            self.scheduler.fail([row.request_id for row in plan.rows], error)
            return None

    def _stats(self, step: int) -> EngineStats:
        running, waiting = self.scheduler.adapter_names()
        return EngineStats(
            step=step,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_waiting_adapter=self.scheduler.num_waiting_adapter,
            kv_pages_total=self.kv.num_pages,
            kv_pages_used=self.kv.num_held,
            prefix_cache_queries=self.kv.queries,
            prefix_cache_hits=self.kv.hits,
            preemptions=self.scheduler.preemptions,
            adapter_device_bytes_used=self.adapters.device_bytes_used,
            adapter_host_bytes_used=self.adapters.host_bytes_used,
            adapter_loads=self.adapters.loads,
            adapter_load_failures=self.adapters.load_failures,
            adapter_evictions_device=self.adapters.evictions_device,
            adapter_evictions_host=self.adapters.evictions_host,
            running_adapters=running,
            waiting_adapters=waiting,
        )
