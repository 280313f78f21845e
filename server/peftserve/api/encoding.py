"""Encoding of texts off the event loop."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

import anyio.to_thread

_LONG_SIZE: Final = 1 << 16  # characters or token ids
_LONG_AT_ONCE: Final = 2

T = TypeVar("T")


class Encodings:
    """Long texts wait for their turn: a flood of them must leave cores to the engine, and threads to everybody else."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_LONG_AT_ONCE)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """`work` in a thread, `size` characters or token ids of it. Whoever is cancelled keeps his turn until it is
        through, since the thread goes on; who was still waiting for one leaves nothing behind."""
        if size <= _LONG_SIZE:
            return await anyio.to_thread.run_sync(work)
        await self._turns.acquire()
        task = asyncio.ensure_future(anyio.to_thread.run_sync(work))
        task.add_done_callback(self._through)
        return await asyncio.shield(task)

    def _through(self, task: "asyncio.Future[Any]") -> None:
        self._turns.release()
        if not task.cancelled():
            task.exception()  # the caller has it, if there still is one
