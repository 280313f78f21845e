"""What runs in the next step: decode first, then prefill chunks, then whoever may start. Imports no torch.

`schedule` makes a `StepPlan`, `commit` takes its `StepResult` in; between the two nothing changes. Decode comes first,
so that running streams never wait for a prompt; prompts share what is left of the token budget in chunks. A request
that comes up in fair order but cannot be placed (no room for its adapter or its KV pages) may be overtaken, but not for
ever: `starvation_s` after that nobody starts before it but those that do not delay it (see `backfill`), and adapters
that nobody uses are evicted for its sake, by one request a step. One that pinned adapters leave no room for fails at
once.
"""

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from peftserve.engine import page_hashes
from peftserve.engine import plan as plans
from peftserve.engine.adapter_cache import AdapterCache
from peftserve.engine.adapter_entry import AdapterState
from peftserve.engine.backfill import Backfill, Bounds
from peftserve.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.plan import PageCopy, Row, SampleSpec, StepPlan, StepResult
from peftserve.engine.request import Request, RequestState
from peftserve.engine.request_events import next_event
from peftserve.errors import AdapterLoadError, InternalError, OverloadedError, PeftserveError, PromptTooLongError
from peftserve.types import AdapterKind, EngineRequest, FinishReason, TokenEvent, TokenLogprobs

_KIND_ORDER = {kind: order for order, kind in enumerate(AdapterKind)}


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of a request, in tokens and sequences; `stop_token_ids` are the model's own."""

    max_batch_tokens: int
    max_num_seqs: int
    max_model_len: int
    starvation_s: float
    stop_token_ids: frozenset[int]


class Scheduler:
    """All live requests, from `add` to their final event."""

    def __init__(
        self,
        limits: SchedulerLimits,
        kv: KvPageManager,
        adapters: AdapterCache,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.preemptions = 0
        self.running: list[Request] = []  # in order of admission
        self.waiting = FairQueue()
        self._limits = limits
        self._bounds = Bounds(limits.max_batch_tokens, limits.max_model_len)
        self._kv = kv
        self._adapters = adapters
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._awaiting_adapter: dict[str, list[Request]] = {}  # by digest
        self._events: list[TokenEvent] = []  # made outside of a commit, sent with the next one
        self._step = 0

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, spec: EngineRequest) -> None:
        """Take a request in. Whatever is wrong with it becomes its final event."""
        seed = spec.sampling.seed if spec.sampling.seed is not None else random.getrandbits(63)
        request = Request(spec, seed=seed, arrived=self._clock())
        if spec.id in self._requests:
            raise RuntimeError(f"request id {spec.id} is in use")
        self._requests[spec.id] = request
        self.waiting.enter(request)
        if spec.adapter is None:
            self._adapter_ready(request)
            return
        self._adapters.want(spec.adapter)
        self._awaiting_adapter.setdefault(spec.adapter.digest, []).append(request)
        self._adapter_changed(spec.adapter.digest)

    def abort(self, request_id: str) -> None:
        """End a request in any live state; its pages and its adapter are free at once. Unknown ids are ignored."""
        if request := self._requests.get(request_id):
            self._finish(request, FinishReason.ABORT)

    def fail(self, requests: Collection[str], error: PeftserveError) -> None:
        """End these requests with an error."""
        for request_id in requests:
            if request := self._requests.get(request_id):
                self._finish(request, FinishReason.ERROR, error=error)

    def fail_all(self, error: PeftserveError) -> None:
        """End every live request with an error."""
        self.fail(list(self._requests), error)

    # -- one step ------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step. Its plan may have no rows: nothing can run now."""
        for digest in self._adapters.poll():
            self._adapter_changed(digest)
        budget = self._limits.max_batch_tokens
        chunks: dict[Request, int] = {}
        copies: dict[Request, PageCopy] = {}
        budget = self._schedule_running(chunks, budget)
        self._admit(chunks, copies, budget)
        self._step += 1
        ordered = sorted(chunks, key=lambda r: (_KIND_ORDER[_kind(r)], r.slot))
        rows = tuple(self._row(request, chunks[request]) for request in ordered)
        return StepPlan(
            step=self._step,
            rows=rows,
            page_copies=tuple(copies.values()),
            lora=plans.segments(rows, AdapterKind.LORA),
            bottleneck=plans.segments(rows, AdapterKind.BOTTLENECK),
        )

    def commit(self, plan: StepPlan, result: StepResult | None) -> list[TokenEvent]:
        """Take in what a plan gave (None: it was not executed); returns all events since the last commit."""
        for row in plan.rows if result else ():
            request = self._requests.get(row.request_id)
            if request is None:
                continue
            self._advance(request, row.num_tokens)
            if result and (sampled := result.sampled.get(row.request_id)):
                self._take(request, sampled)
        events, self._events = self._events, []
        return events

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def num_waiting_adapter(self) -> int:
        return sum(len(requests) for requests in self._awaiting_adapter.values())

    @property
    def has_events(self) -> bool:
        """Whether a commit would return events even without a step."""
        return bool(self._events)

    def adapter_names(self) -> tuple[list[str], list[str]]:
        """Names of the adapters that running requests use, and of those that only waiting ones want."""
        running = {r.spec.adapter.name for r in self.running if r.spec.adapter}
        live = {r.spec.adapter.name for r in self._requests.values() if r.spec.adapter}
        return sorted(running), sorted(live - running)

    # -- inside --------------------------------------------------------------------------------------------------

    def _adapter_changed(self, digest: str) -> None:
        """Let the requests that wait for an adapter go on, or end with the reason why it cannot be loaded."""
        state = self._adapters.state(digest)
        if state is AdapterState.FAILED:
            cause = self._adapters.error(digest) or AdapterLoadError("no reason is known")
            waiting = [request for request in self.waiting if request.digest == digest]
            for request in waiting + self._awaiting_adapter.get(digest, []):
                # By the name that this request has for it: another tenant's is nobody else's business.
                message = f"adapter {_adapter_name(request)} cannot be loaded: {cause.message}"
                error = AdapterLoadError(message, faults=cause.faults, retry_after_s=cause.retry_after_s)
                self._finish(request, FinishReason.ERROR, error=error)
        elif self._adapters.is_on_host(digest):
            for request in self._awaiting_adapter.pop(digest, ()):
                request.num_virtual_tokens = self._adapters.num_virtual_tokens(digest)
                self._adapter_ready(request)

    def _adapter_ready(self, request: Request) -> None:
        """WAITING_ADAPTER -> WAITING, now that its length in KV positions is known."""
        request.adapter_ready = self._clock()
        request.move(RequestState.WAITING)
        self.waiting.push(request)
        if request.num_positions >= self._limits.max_model_len:
            error = PromptTooLongError(
                f"the prompt has {len(request.spec.prompt_token_ids)} tokens and the adapter "
                f"{request.num_virtual_tokens} virtual ones; the context holds {self._limits.max_model_len} "
                "and at least one must be left to generate",
                field="prompt",
            )
            self._finish(request, FinishReason.ERROR, error=error)

    def _schedule_running(self, chunks: dict[Request, int], budget: int) -> int:
        """Decodes first, then the next chunks of running prefills; returns the budget left."""
        decodes = [request for request in self.running if request.num_pending == 1]
        prefills = [request for request in self.running if request.num_pending > 1]
        for request in decodes + prefills:
            if request.state is not RequestState.RUNNING or not budget:
                continue  # preempted by one before it, or out of budget
            size = min(request.num_pending, budget)
            if not self._grow(request, size, chunks):
                continue
            chunks[request] = size
            budget -= size
            self._charge(request, size)
        return budget

    def _grow(self, request: Request, num_tokens: int, chunks: Collection[Request]) -> bool:
        """Give `request` the pages for its next tokens, preempting the latest to start; False if that was itself."""
        needed = self._kv.pages_for(request.num_computed + num_tokens) - len(request.block_table)
        while needed > 0 and (pages := self._kv.allocate(needed)) is None:
            if self._adapters.reclaim_pages():
                continue
            victim = next(r for r in reversed(self.running) if r not in chunks)
            self._preempt(victim)
            if victim is request:
                return False
        if needed > 0 and pages:
            request.block_table += pages
        return True

    def _admit(self, chunks: dict[Request, int], copies: dict[Request, PageCopy], budget: int) -> None:
        """Start waiting requests in fair order while there is room."""
        if budget <= 0 or len(self.running) >= self._limits.max_num_seqs:
            return
        now = self._clock()
        order = self.waiting.in_order()
        urged = False
        beside: Backfill | None = None  # a request that has starved, if there is one
        while budget > 0 and len(self.running) < self._limits.max_num_seqs:
            request = order.next()
            if request is None:
                return
            if beside is not None and not beside.take(request):
                continue
            starved = beside is None and self._has_starved(request, now)
            if not self._start(request, copies, urgent=starved and not urged):
                if request.refused is None:
                    request.refused = now
                if (
                    starved
                    and beside is None
                    and request.state is RequestState.WAITING
                    and not self._on_its_way(request)
                ):
                    urged = True
                    if self.running and (beside := self._beside(request)) is None:
                        return
                continue
            size = min(request.num_pending, budget)
            chunks[request] = size
            budget -= size
            self._charge(request, size)
            order.served(request)

    def _has_starved(self, request: Request, now: float) -> bool:
        return request.refused is not None and now - request.refused > self._limits.starvation_s

    def _beside(self, request: Request) -> Backfill | None:
        """Who may start before a request that has starved; None for nobody. It lacks KV pages, or else a place for its
        adapter, of which it is not known when there will be one."""
        if request.digest is not None and self._adapters.state(request.digest) is not AdapterState.DEVICE:
            return None
        return Backfill.beside(request, self.running, self._kv, self._bounds)

    def _on_its_way(self, request: Request) -> bool:
        """Whether the request waits for nothing but its adapter's copy, for which nobody has to be held back."""
        return request.digest is not None and self._adapters.state(request.digest) is AdapterState.LOADING

    def _start(self, request: Request, copies: dict[Request, PageCopy], *, urgent: bool) -> bool:
        """WAITING -> RUNNING with its adapter and pages for all its known tokens; False when they are not to be had."""
        digest = request.digest
        prefix: tuple[int, ...] = ()
        if digest is not None:
            slot = self._adapters.acquire(digest, urgent=urgent)
            if slot is None:
                self._fail_if_kept_out(request)
                return False
            request.slot = slot
            prefix = self._adapters.prefix_pages(digest)
        # Full prefix pages are shared as they are; a partly filled last one is copied, as the prompt goes on in it.
        num_full, num_partial = divmod(request.num_virtual_tokens, self._kv.page_size)
        shared = prefix[:num_full]
        size = self._kv.page_size
        full = request.num_positions // size - len(shared)
        page_hashes.extend(request, full, page_size=size, num_shared=len(shared))
        # The last token is always computed, for its logits.
        reusable = (request.num_positions - 1) // size - len(shared)
        cached = self._kv.match(request.page_hashes[:reusable])
        needed = self._kv.pages_for(request.num_positions) - len(shared) - len(cached)
        while (own := self._kv.allocate(needed)) is None:
            if not (urgent or not self.running) or not self._adapters.reclaim_pages():
                self._kv.release(cached)
                if digest is not None:
                    self._adapters.release(digest)
                self._fail_if_hopeless(request, needed)
                return False
        request.block_table = [*shared, *cached, *own]
        request.num_shared_pages = len(shared)
        request.num_computed = max(request.num_virtual_tokens, (len(shared) + len(cached)) * size)
        if request.first_scheduled is None:
            request.first_scheduled = self._clock()
            request.num_cached_tokens = request.num_computed - request.num_virtual_tokens
            self._kv.count_lookup(len(request.spec.prompt_token_ids), request.num_cached_tokens)
        if num_partial and not cached:
            copies[request] = PageCopy(prefix[num_full], own[0], num_partial)
        self.waiting.remove(request)
        if digest is not None:
            self._adapters.unwant(digest)
        request.refused = None
        request.move(RequestState.RUNNING)
        self.running.append(request)
        return True

    def _fail_if_kept_out(self, request: Request) -> None:
        if request.digest is not None and self._adapters.is_kept_out(request.digest):
            is_prefix = _kind(request) is AdapterKind.PREFIX
            error = OverloadedError(
                f"adapter {_adapter_name(request)} does not fit beside the pinned adapters; unpin one, or raise "
                + ("kv_cache_bytes" if is_prefix else "adapter_device_bytes or max_device_adapters"),
            )
            self._finish(request, FinishReason.ERROR, error=error)

    def _fail_if_hopeless(self, request: Request, needed: int) -> None:
        """With nothing running, pages that are missing now will never come: pinned prefix adapters hold them."""
        if not self.running and not self._adapters.pages_in_transit:
            error = OverloadedError(
                f"the request needs {needed} KV pages and only {self._kv.num_available} are not held by "
                "pinned prefix adapters; unpin one, or raise kv_cache_bytes",
            )
            self._finish(request, FinishReason.ERROR, error=error)

    def _preempt(self, request: Request) -> None:
        """RUNNING -> WAITING: give everything back; its tokens are computed again, or come from the prefix cache."""
        self.preemptions += 1
        if request.spec.adapter:
            self._adapters.want(request.spec.adapter)  # first, or an adapter that was unloaded meanwhile would go now
        self._give_back(request)
        request.move(RequestState.WAITING)
        self.waiting.push_front(request)

    def _give_back(self, request: Request) -> None:
        self.running.remove(request)
        self._kv.release(request.block_table[request.num_shared_pages :])
        request.block_table = []
        request.num_shared_pages = 0
        request.num_computed = 0
        if request.digest is not None:
            self._adapters.release(request.digest)

    def _row(self, request: Request, size: int) -> Row:
        first = request.num_computed - request.num_virtual_tokens
        return Row(
            request_id=request.id,
            kind=_kind(request),
            slot=request.slot,
            token_ids=request.token_ids[first : first + size],
            num_computed=request.num_computed,
            block_table=request.block_table,
            sample=self._sample_spec(request) if size == request.num_pending else None,
        )

    def _sample_spec(self, request: Request) -> SampleSpec:
        params = request.spec.sampling
        banned: frozenset[int] = frozenset()
        if len(request.output_token_ids) < params.min_tokens:
            banned = params.stop_token_ids | self._limits.stop_token_ids
        return SampleSpec(params, request.seed, len(request.output_token_ids), request.token_counts, banned)

    def _charge(self, request: Request, num_tokens: int) -> None:
        decoding = num_tokens == 1 and bool(request.output_token_ids)
        self.waiting.charge(request, num_tokens, OUTPUT_WEIGHT if decoding else PROMPT_WEIGHT)

    def _advance(self, request: Request, num_tokens: int) -> None:
        """`num_tokens` more are in the KV cache; the pages that this filled go into the prefix cache."""
        size, shared = self._kv.page_size, request.num_shared_pages
        first = max(request.num_computed // size - shared, 0)
        request.num_computed += num_tokens
        full = request.num_computed // size - shared
        page_hashes.extend(request, full, page_size=size, num_shared=shared)
        for index in range(first, full):
            self._kv.publish(request.block_table[shared + index], request.page_hashes[index])

    def _take(self, request: Request, sampled: plans.Sampled) -> None:
        """Append a sampled token and end the request if that was its last."""
        if not sampled.is_finite:
            who = f"adapter {_adapter_name(request)}" if request.spec.adapter else "the base model"
            error = InternalError(f"the output of {who} is not a number: its weights overflow in the served dtype")
            self._finish(request, FinishReason.ERROR, error=error)
            return
        params = request.spec.sampling
        token = sampled.token_id
        stops = token in params.stop_token_ids or (not params.ignore_eos and token in self._limits.stop_token_ids)
        if stops:
            self._finish(request, FinishReason.STOP, stop_token_id=token)
            return
        request.append(token)
        logprobs = [sampled.logprobs] if sampled.logprobs else []
        if self._bounds.num_left(request) <= 0:
            self._finish(request, FinishReason.LENGTH, token_ids=[token], logprobs=logprobs)
        else:
            self._events.append(next_event(request, [token], logprobs))

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        error: PeftserveError | None = None,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[TokenLogprobs] = (),
        stop_token_id: int | None = None,
    ) -> None:
        """The one way out: everything the request holds is given back, and its final event is queued."""
        if request.state is RequestState.RUNNING:
            self._give_back(request)
        else:
            if request.state is RequestState.WAITING:
                self.waiting.remove(request)
            else:
                self._stop_awaiting(request)
            if request.digest is not None:
                self._adapters.unwant(request.digest)
        request.move(RequestState.FINISHED)
        del self._requests[request.id]
        self.waiting.leave(request)
        self._events.append(
            next_event(request, token_ids, logprobs, finish_reason=reason, stop_token_id=stop_token_id, error=error)
        )

    def _stop_awaiting(self, request: Request) -> None:
        requests = self._awaiting_adapter[request.digest or ""]
        requests.remove(request)
        if not requests:
            del self._awaiting_adapter[request.digest or ""]


def _adapter_name(request: Request) -> str:
    return request.spec.adapter.name if request.spec.adapter else ""


def _kind(request: Request) -> AdapterKind:
    return request.spec.adapter.kind if request.spec.adapter else AdapterKind.BASE
