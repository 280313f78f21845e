"""From a client's request to deltas: the one way that both front doors take.

resolve the adapter -> encode -> check lengths -> admit -> run all sequences -> their deltas in one stream
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from peftserve.adapters.manifest import AdapterRecord
from peftserve.api import limits as bounds
from peftserve.api.adapter_service import AdapterService, num_virtual_tokens
from peftserve.api.encoding import Encodings
from peftserve.api.request import (
    ChatPrompt,
    Delta,
    GenerateRequest,
    Prompt,
    Summary,
    TextPrompt,
    Timings,
    TokenPrompt,
    Usage,
    merge,
)
from peftserve.api.sequence import SequenceOutput
from peftserve.config import LimitsConfig
from peftserve.engine.client import EngineState
from peftserve.engine.messages import EngineInfo, EngineStats
from peftserve.errors import DeadlineExceededError, OverloadedError, UnavailableError
from peftserve.metrics import Metrics, RequestMetrics
from peftserve.text.stream import TextStream
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import AdapterRef, EngineRequest, SamplingParams, TokenEvent

# In characters or token ids, over all prompts of a request.
_INLINE_SIZE = 4096  # less is encoded at once: a thread costs more than it saves
_MERGE_AT = 64  # deltas of one sequence that wait for a slow reader
_RETRY_S = 2.0


class Engine(Protocol):
    """What generation needs of `engine.client.EngineClient`."""

    @property
    def state(self) -> EngineState: ...
    @property
    def info(self) -> EngineInfo | None: ...
    @property
    def stats(self) -> EngineStats: ...
    def submit(self, request: EngineRequest, take: Callable[[TokenEvent], None]) -> None: ...
    def abort(self, request_id: str) -> None: ...


class GenerationService:
    """Runs requests. All methods belong to one event loop."""

    def __init__(
        self,
        *,
        engine: Engine,
        adapters: AdapterService,
        tokenizer: Tokenizer,
        limits: LimitsConfig,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._limits = limits
        self._metrics = metrics
        self._ids = itertools.count()
        self._runs: set[_Run] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._mean_s = 1.0  # running mean of a request's duration, for the Retry-After hint
        self.encodings = Encodings()
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a request would be accepted now, load aside."""
        return self._engine.state is EngineState.READY and not self.draining

    @property
    def num_sequences(self) -> int:
        """Sequences accepted that the engine has not ended, whether or not their clients have read everything."""
        return sum(run.num_open for run in self._runs)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """The deltas of all sequences as they come; closing or cancelling the iterator aborts what still runs.

        Raises before the first delta: InvalidRequestError, PromptTooLongError, AdapterNotFoundError, OverloadedError,
        UnavailableError. At any time: DeadlineExceededError, EngineDeadError, AdapterLoadError, RequestAbortedError.
        """
        arrived = time.monotonic()
        info = self._engine_info()
        bounds.check_sampling(request, self._limits, info)
        record = await self._resolve(request)
        prompts = await self._encode(request, info)
        max_tokens = [
            bounds.resolve_max_tokens(request, len(prompt), _virtual_tokens(record), info.max_model_len)
            for prompt in prompts
        ]
        self._engine_info()  # resolving and encoding took a while: the server may be going down by now
        self._admit(len(prompts) * request.sampling.n)
        adapter = None if record is None else record.ref
        observed = self._metrics.request(adapter)
        sequences = self._sequences(request, prompts, max_tokens, adapter)
        run = _Run(self._engine, sequences, observed, arrived)
        self._runs.add(run)
        self._idle.clear()
        timeout_s = min(self._limits.request_timeout_s, request.timeout_s or float("inf"))
        try:
            run.start(timeout_s)
            while run.num_unread:
                delta = await run.next()
                if run.num_unread == 0:
                    cached = sum(sequence.num_cached_tokens for sequence in sequences)
                    usage = Usage(
                        prompt_tokens=sum(map(len, prompts)),
                        completion_tokens=sum(sequence.num_tokens for sequence in sequences),
                        # Every choice looks its prompt up; the client sent it once.
                        cached_tokens=cached // request.sampling.n,
                    )
                    yield msgspec.structs.replace(delta, summary=run.summary(adapter, usage))
                else:
                    yield delta
        finally:
            run.close()
            self._runs.discard(run)
            self._mean_s += 0.1 * (time.monotonic() - arrived - self._mean_s)
            if not self._runs:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and wait for what runs; after `timeout_s` fail the rest. True if none had to be."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for run in list(self._runs):
                run.fail(UnavailableError("the server is shutting down", retry_after_s=_RETRY_S))
            return False
        return True

    def _engine_info(self) -> EngineInfo:
        if self.draining:
            raise UnavailableError("the server is shutting down", retry_after_s=_RETRY_S)
        info = self._engine.info
        if info is None or self._engine.state is not EngineState.READY:
            raise UnavailableError(f"the engine is {self._engine.state}; try again", retry_after_s=_RETRY_S)
        return info

    async def _resolve(self, request: GenerateRequest) -> AdapterRecord | None:
        if request.adapter_id is None:
            return None
        return await self._adapters.resolve(request.tenant, request.adapter_id, field=request.adapter_field)

    async def _encode(self, request: GenerateRequest, info: EngineInfo) -> list[list[int]]:
        """The prompts as tokens. What takes long does so off the event loop, and only a few at a time."""
        size = sum(map(_size, request.prompts))
        if size <= _INLINE_SIZE and not any(isinstance(prompt, ChatPrompt) for prompt in request.prompts):
            return self._encode_all(request, info)
        return await self.encodings.run(size, lambda: self._encode_all(request, info))

    def _encode_all(self, request: GenerateRequest, info: EngineInfo) -> list[list[int]]:
        return [self._encode_one(prompt, request.prompt_field, info) for prompt in request.prompts]

    def _encode_one(self, prompt: Prompt, field: str, info: EngineInfo) -> list[int]:
        context = info.max_model_len
        match prompt:
            case TokenPrompt(token_ids=ids):
                bounds.check_could_fit(len(ids), context, field, f"{len(ids)} token ids")
                return bounds.check_token_ids(ids, info.spec.vocab_size, field)
            case TextPrompt(text=text):
                special = True
            case ChatPrompt(messages=messages):
                text = self._tokenizer.render_chat([message.for_template() for message in messages])
                special = False  # the template writes them itself
        bounds.check_could_fit(self._tokenizer.min_tokens(text), context, field, f"{len(text)} characters")
        return bounds.check_not_empty(self._tokenizer.encode(text, add_special_tokens=special), field)

    def _admit(self, count: int) -> None:
        """Refuse what would make the queue longer than `max_waiting`."""
        running = self._engine.stats.num_running
        waiting = max(0, self.num_sequences - running)
        if waiting + count > self._limits.max_waiting:
            retry_s = min(60.0, max(1.0, self._mean_s * waiting / max(1, running)))
            raise OverloadedError(
                f"{waiting} requests are waiting and the limit is {self._limits.max_waiting}; try again later",
                retry_after_s=round(retry_s, 1),
            )

    def _sequences(
        self,
        request: GenerateRequest,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        adapter: AdapterRef | None,
    ) -> list[SequenceOutput]:
        sampling = request.sampling
        return [
            SequenceOutput(
                index=p * sampling.n + i,
                request=EngineRequest(
                    # A client may repeat its own id; the engine's must be unique.
                    id=f"{request.id}/{next(self._ids)}",
                    prompt_token_ids=prompt,
                    sampling=_sampling_params(request, limit, i),
                    tenant=request.tenant,
                    adapter=adapter,
                ),
                text=TextStream(
                    self._tokenizer,
                    stop=sampling.stop,
                    include_stop=sampling.include_stop_str_in_output,
                    min_tokens=sampling.min_tokens,
                    skip_special_tokens=sampling.skip_special_tokens,
                ),
                tokenizer=self._tokenizer,
            )
            for p, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
            for i in range(sampling.n)
        ]


class _Run:
    """The sequences of one request while they run, and what of them the client has not taken yet.

    Events become deltas as they come, so that a stop string frees the engine at once. A client that reads slowly finds
    what came meanwhile in one delta per sequence: what waits for it is never more than the request's own `max_tokens`.
    """

    def __init__(
        self, engine: Engine, sequences: Sequence[SequenceOutput], observed: RequestMetrics, arrived: float
    ) -> None:
        self._engine = engine
        self._sequences = sequences
        self._observed = observed
        self._arrived = arrived
        self._last_at = [arrived] * len(sequences)
        self._unread: dict[int, list[Delta]] = {}  # by sequence, the one that has waited longest first
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.num_open = len(sequences)
        self.num_unread = len(sequences)  # sequences whose last delta has not been taken

    def start(self, timeout_s: float) -> None:
        """Hand the sequences to the engine. `timeout_s` counts from the arrival."""
        left = max(0.0, self._arrived + timeout_s - time.monotonic())
        error = DeadlineExceededError(f"the request took longer than {timeout_s:g} s")
        self._timer = asyncio.get_running_loop().call_later(left, self.fail, error)
        for position, sequence in enumerate(self._sequences):
            self._engine.submit(sequence.request, partial(self._take, position, sequence))

    async def next(self) -> Delta:
        """What has come of one sequence since it was last asked for; `num_unread` is 0 with the last of all.

        Raises what ended the request, after what came before it.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        position = next(iter(self._unread))
        delta = merge(self._unread.pop(position))
        self.num_unread -= delta.finish_reason is not None
        return delta

    def fail(self, error: Exception) -> None:
        """End the request with `error`, in the engine at once, whenever the client reads of it."""
        if self._error is None:
            self._error = error
            self._abort()
            self._news.set()

    def close(self) -> None:
        """Abort what still runs and count the request."""
        if self._timer is not None:
            self._timer.cancel()
        self._abort()
        now = time.monotonic()
        for sequence in self._sequences:
            self._observed.finished(
                reason=sequence.outcome,
                prompt_tokens=sequence.num_prompt_tokens if sequence.was_started else 0,
                seconds=now - self._arrived,
            )

    def summary(self, adapter: AdapterRef | None, usage: Usage) -> Summary:
        now = time.monotonic()
        first = min((s.first_token_at for s in self._sequences if s.first_token_at is not None), default=now)
        timings = Timings(
            queued_s=max(s.queued_s for s in self._sequences),
            adapter_wait_s=max(s.adapter_wait_s for s in self._sequences),
            first_token_s=first - self._arrived,
            total_s=now - self._arrived,
        )
        return Summary(adapter=adapter, usage=usage, timings=timings)

    def _abort(self) -> None:
        for sequence in self._sequences:
            self._engine.abort(sequence.request.id)
        self.num_open = 0

    def _take(self, position: int, sequence: SequenceOutput, event: TokenEvent) -> None:
        """The engine's next event of a sequence. Called for every token: keep it short."""
        if self._error is not None:
            return
        now = time.monotonic()
        if event.token_ids:
            first = sequence.first_token_at is None
            self._observed.tokens(now - self._last_at[position], count=len(event.token_ids), first=first)
            self._last_at[position] = now
        try:
            delta = sequence.take(event, now)
        except Exception as error:
            sequence.outcome = "error"
            self.fail(error)
            return
        waiting = self._unread.setdefault(position, [])
        waiting.append(delta)
        if len(waiting) >= _MERGE_AT:
            waiting[:] = [merge(waiting)]
        if delta.finish_reason is not None:
            self.num_open -= 1
            self._engine.abort(sequence.request.id)  # a stop string: the engine knows nothing of it
        self._news.set()


def _wrapped(seed: int) -> int:
    """As int64 wraps around."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _sampling_params(request: GenerateRequest, max_tokens: int, choice: int) -> SamplingParams:
    sampling = request.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_k=max(0, sampling.top_k),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        # Choices of one request must differ; the engine draws a seed of its own where none is given.
        seed=None if sampling.seed is None else _wrapped(sampling.seed + choice),
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        stop_token_ids=frozenset(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
    )


def _size(prompt: Prompt) -> int:
    match prompt:
        case TokenPrompt(token_ids=ids):
            return len(ids)
        case TextPrompt(text=text):
            return len(text)
        case ChatPrompt(messages=messages):
            return sum(message.size for message in messages)


def _virtual_tokens(record: AdapterRecord | None) -> int:
    return 0 if record is None else num_virtual_tokens(record)
