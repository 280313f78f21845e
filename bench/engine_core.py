"""An engine core in this process, driven by hand: no server, no second process, nothing but steps."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from peftserve.config import EngineConfig
from peftserve.engine.build import build_engine
from peftserve.engine.messages import AbortRequest, AddRequest, PrefetchAdapter
from peftserve.types import AdapterRef, EngineRequest, FinishReason, SamplingParams
from synthetic import TENANT

Streams = Sequence[tuple[Sequence[int], AdapterRef | None]]
"""A prompt and an adapter (None: the bare base) for each stream."""

WARM_STEPS = 2
_TIMEOUT_S = 1800.0
_LOAD_POLL_S = 0.05


class BenchEngine:
    """A core on `checkpoint` that loads adapters from the store under `data_dir`.

    Cores may share a `data_dir`. Settings that are not given have the server's defaults.
    """

    def __init__(self, checkpoint: Path, data_dir: Path, **settings: object) -> None:
        config = EngineConfig.model_validate({"model": str(checkpoint), "data_dir": data_dir} | settings)
        self._loaded = threading.Event()
        self._core, self.info = build_engine(config, checkpoint, self._loaded.set)
        self._numbers = itertools.count()
        self._unfinished: set[str] = set()

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        """Bring adapters to the host tier, where all of them must have room; returns when they are there."""
        adapters = self._core.adapters
        for ref in refs:
            self._core.handle(PrefetchAdapter(adapter=ref))
        # Polled rather than stepped: an idle engine's step reports where all adapters are.
        while adapters.loads + adapters.load_failures < len(refs):
            self._loaded.clear()
            if not adapters.poll():
                self._loaded.wait(_LOAD_POLL_S)
        missing = [ref.name for ref in refs if not adapters.is_on_host(ref.digest)]
        if missing:
            raise RuntimeError(f"{len(missing)} adapters are not on the host, {missing[0]} among them")

    def decode_s(self, streams: Streams, steps: int) -> list[float]:
        """Seconds of each of `steps` steps that decode one token of every stream.

        Prompts are prefilled before, into the prefix cache, so that all streams then start together; a later call with
        the same streams finds them there. Raises RuntimeError when they do not all fit the KV cache.
        """
        ids = self._start(streams, max_tokens=2 * (WARM_STEPS + steps) + len(streams))
        seconds = [self._decode_step(len(streams)) for _ in range(WARM_STEPS + steps)]
        self._abort(ids)
        return seconds[WARM_STEPS:]

    def churn_s(self, streams: Streams, steps: int) -> list[float]:
        """The same while at each step the oldest request goes and another with its prompt and adapter comes."""
        ids = deque(self._start(streams, max_tokens=2 * (WARM_STEPS + steps) + len(streams)))
        seconds = []
        for step in range(WARM_STEPS + steps):
            self._core.handle(AbortRequest(request_id=ids.popleft()))
            ids += self._add([streams[step % len(streams)]], max_tokens=steps + len(streams))
            seconds.append(self._step()[1])
        self._abort(ids)
        return seconds[WARM_STEPS:]

    def close(self) -> None:
        """Stop the loader threads."""
        self._core.adapters.close()

    def _start(self, streams: Streams, max_tokens: int) -> list[str]:
        """Requests for all streams, each of which is about to decode."""
        refs = [adapter for _, adapter in streams if adapter]
        self._add(streams, max_tokens=1)
        self._step_until(lambda: not self._unfinished, refs)
        ids = self._add(streams, max_tokens=max_tokens)
        self._step_until(lambda: self._decoding(len(streams)), refs)
        return ids

    def _abort(self, ids: Iterable[str]) -> None:
        for request_id in ids:
            self._core.handle(AbortRequest(request_id=request_id))
        self._step_until(lambda: not self._unfinished, ())

    def _add(self, streams: Streams, max_tokens: int) -> list[str]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        ids = []
        for prompt, adapter in streams:
            request = EngineRequest(
                id=f"bench-{next(self._numbers)}",
                prompt_token_ids=list(prompt),
                sampling=sampling,
                tenant=TENANT,
                adapter=adapter,
            )
            self._core.handle(AddRequest(request=request))
            self._unfinished.add(request.id)
            ids.append(request.id)
        return ids

    def _decoding(self, count: int) -> bool:
        running = self._core.scheduler.running
        return len(running) == count and all(request.num_pending == 1 for request in running)

    def _decode_step(self, count: int) -> float:
        tokens, seconds = self._step()
        if tokens != count:
            raise RuntimeError(f"a step that should decode {count} streams had {tokens} tokens")
        return seconds

    def _step(self) -> tuple[int, float]:
        """One step: how many tokens it computed, and its seconds with all that it reports."""
        began = time.perf_counter()
        update = self._core.step()
        seconds = time.perf_counter() - began
        for event in update.events:
            if event.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"a request failed: {event.error}")
            if event.finish_reason:
                self._unfinished.discard(event.request_id)
        return update.num_batch_tokens, seconds

    def _step_until(self, done: Callable[[], bool], refs: Sequence[AdapterRef]) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not done():
            self._loaded.clear()
            if self._step()[0] or done():
                continue
            for ref in refs:
                if error := self._core.adapters.error(ref.digest):
                    raise RuntimeError(error.message)
            if time.monotonic() > deadline:
                raise RuntimeError(f"the streams do not fit: nothing runs after {_TIMEOUT_S:.0f} s")
            self._loaded.wait(_LOAD_POLL_S)
