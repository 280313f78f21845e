"""Long texts take turns, whoever goes away meanwhile."""

import asyncio
import threading

import pytest

from peftserve.api import encoding
from peftserve.api.encoding import Encodings

LONG = encoding._LONG_SIZE + 1


class _Work:
    """Stays in its thread until it is let go, and counts how many do so at once."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self.busy = self.most = self.begun = 0

    def __call__(self) -> str:
        with self.lock:
            self.begun += 1
            self.busy += 1
            self.most = max(self.most, self.busy)
        self.go_on.wait(20)
        with self.lock:
            self.busy -= 1
        return "done"


async def test_who_is_cancelled_keeps_his_turn_until_his_thread_is_through() -> None:
    encodings, work = Encodings(), _Work()
    for _ in range(10):
        task = asyncio.create_task(encodings.run(LONG, work))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert work.begun == encoding._LONG_AT_ONCE, "those that had no turn yet leave nothing behind"
    waiting = asyncio.create_task(encodings.run(LONG, work))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert await encodings.run(1, lambda: "short") == "short"
    work.go_on.set()
    assert await waiting == "done"
    assert work.most == encoding._LONG_AT_ONCE


async def test_an_error_is_the_callers_and_gives_the_turn_back() -> None:
    encodings = Encodings()
    for _ in range(2 * encoding._LONG_AT_ONCE):
        with pytest.raises(ZeroDivisionError):
            await encodings.run(LONG, lambda: 1 // 0)
