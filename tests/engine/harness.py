"""An engine core on the simulated device, with the bookkeeping that every scheduler test needs."""

from peftserve.engine.adapter_cache import AdapterCache
from peftserve.engine.core import EngineCore
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.messages import AddRequest
from peftserve.engine.scheduler import Scheduler, SchedulerLimits
from peftserve.types import EngineRequest, TokenEvent

from .simulator import SimulatedMemory, SimulatedRunner


class Harness:
    """Drives a core step by step on a clock of its own and collects events by request."""

    def __init__(
        self,
        *,
        memory: SimulatedMemory | None = None,
        num_pages: int = 32,
        page_size: int = 4,
        max_batch_tokens: int = 16,
        max_num_seqs: int = 8,
        max_model_len: int = 64,
        host_bytes: int = 1000,
        prefix_caching: bool = True,
        starvation_s: float = 5.0,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.now = 0.0
        self.memory = memory or SimulatedMemory()
        self.kv = KvPageManager(num_pages, page_size, prefix_caching=prefix_caching)
        self.adapters = AdapterCache(
            self.memory, self.kv, host_bytes=host_bytes, retry_s=0.0, starvation_s=starvation_s
        )
        limits = SchedulerLimits(
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            starvation_s=starvation_s,
            stop_token_ids=stop_token_ids,
        )
        self.scheduler = Scheduler(limits, self.kv, self.adapters, clock=lambda: self.now)
        self.runner = SimulatedRunner(self.memory, page_size)
        self.core = EngineCore(self.scheduler, self.kv, self.adapters, self.runner)
        self.events: dict[str, list[TokenEvent]] = {}

    def add(self, spec: EngineRequest) -> None:
        self.runner.specs[spec.id] = spec
        self.events[spec.id] = []
        self.core.handle(AddRequest(request=spec))

    def step(self, *, settle: bool = True) -> None:
        """One step; `settle` first lets the loader threads finish what they have."""
        if settle:
            self.settle()
        for event in self.core.step().events:
            if self.events[event.request_id] and self.events[event.request_id][-1].finish_reason:
                raise AssertionError(f"{event.request_id} got an event after its last")
            self.events[event.request_id].append(event)
        self.kv.check()
        self.now += 0.1

    def settle(self) -> None:
        """Wait until every submitted loader job has an outcome to poll."""
        pool = self.adapters._pool
        while pool._done.qsize() < pool.in_flight:
            pass

    def finished(self, request_id: str) -> bool:
        events = self.events[request_id]
        return bool(events) and events[-1].finish_reason is not None

    def run(self, max_steps: int = 500) -> None:
        """Step until every request has its final event."""
        for _ in range(max_steps):
            if all(self.finished(request_id) for request_id in self.events):
                return
            self.step()
        unfinished = [request_id for request_id in self.events if not self.finished(request_id)]
        raise AssertionError(f"still unfinished after {max_steps} steps: {unfinished}")

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events[request_id] for token in event.token_ids]

    def check_idle(self) -> None:
        """Nothing runs or waits, and only resident prefix adapters hold pages."""
        if self.scheduler.running or len(self.scheduler.waiting) or self.scheduler.num_waiting_adapter:
            raise AssertionError("requests are left over")
        residency = self.adapters.residency()
        if any(adapter.refs for adapter in residency):
            raise AssertionError("an adapter is still referenced")
        prefix_pages = sum(len(self.adapters.prefix_pages(adapter.digest)) for adapter in residency)
        if self.kv.num_held != prefix_pages:
            raise AssertionError(f"{self.kv.num_held} pages are held, prefix adapters account for {prefix_pages}")
