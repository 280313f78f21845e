"""Jobs off the step thread whose outcomes are taken in by polling. Imports no torch."""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from peftserve.errors import AdapterLoadError, PeftserveError

K = TypeVar("K")
R = TypeVar("R")


class LoaderPool(Generic[K, R]):
    """Runs `threads` jobs at once. `on_done` is called from a worker when `poll` has something to give."""

    def __init__(self, threads: int, on_done: Callable[[], None]) -> None:
        self.threads = threads
        self.in_flight = 0  # step thread only
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="adapter-loader")
        self._done: queue.SimpleQueue[tuple[K, R | PeftserveError]] = queue.SimpleQueue()

    def submit(self, key: K, job: Callable[[], R]) -> None:
        """Run `job`; its result, or the error that it raised, comes back from `poll` with `key`."""
        self.in_flight += 1
        self._executor.submit(self._run, key, job)

    def poll(self) -> list[tuple[K, R | PeftserveError]]:
        """What has finished since the last call, in order."""
        outcomes = []
        while not self._done.empty():
            outcomes.append(self._done.get_nowait())
        self.in_flight -= len(outcomes)
        return outcomes

    def close(self) -> None:
        """Drop jobs that have not started and wait for the others."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, key: K, job: Callable[[], R]) -> None:
        outcome: R | PeftserveError
        try:
            outcome = job()
        except PeftserveError as error:
            outcome = error
        except Exception as error:  # whoever waits for `key` must get an answer, whatever went wrong
            outcome = AdapterLoadError(f"loading failed: {type(error).__name__}: {error}")
        self._done.put((key, outcome))
        self._on_done()
