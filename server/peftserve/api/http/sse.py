"""Answers that take long: server-sent events, and plain ones that stop when the client goes.

Our own few lines rather than sse-starlette, which looks up uvicorn's server behind signal handlers to end all streams
on shutdown: a drain must let them finish.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from peftserve.api import stall
from peftserve.api.http.endpoint import request_id_of, services_of
from peftserve.api.http.errors import error_body, opaque
from peftserve.api.request import Delta
from peftserve.api.stall import StallWatch
from peftserve.errors import RequestAbortedError

PING_S = 15.0
# An error within this time gets a status of its own; later than this, proxies want to see headers.
HEADERS_AFTER_S = 5.0
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(value: Any) -> bytes:
    """One event with `value` as JSON."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def or_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away; then raises `RequestAbortedError`."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestAbortedError("the client went away")
        return task.result()
    finally:
        await _cancel(task, watcher)


async def stream_deltas(
    request: Request,
    deltas: AsyncGenerator[Delta, None],
    render: Callable[[Delta], Iterable[bytes]],
    *,
    end: bytes = b"",
) -> Response:
    """`deltas` as events. Errors before the first one are raised here, so that they become a status of their own."""
    first = asyncio.ensure_future(anext(deltas))
    try:
        watcher = asyncio.create_task(_disconnected(request.receive))
        try:
            await asyncio.wait({first, watcher}, timeout=HEADERS_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done() and not first.done():
                raise RequestAbortedError("the client went away")
        finally:
            await _cancel(watcher)
        if first.done() and (error := first.exception()) is not None:
            raise error
    except BaseException:
        await _cancel(first)
        await deltas.aclose()
        raise
    services, request_id = services_of(request), request_id_of(request)
    timeout_s = services.config.limits.stream_stall_timeout_s

    def on_stall() -> None:
        stall.tell(services.metrics, "http", request_id, timeout_s)

    events = _events(first, deltas, render, end, request_id)
    return EventStream(events, stall_timeout_s=timeout_s, on_stall=on_stall)


async def _events(
    first: "asyncio.Future[Delta]",
    deltas: AsyncGenerator[Delta, None],
    render: Callable[[Delta], Iterable[bytes]],
    end: bytes,
    request_id: str,
) -> AsyncGenerator[bytes, None]:
    try:
        for chunk in render(await first):
            yield chunk
        async for delta in deltas:
            for chunk in render(delta):
                yield chunk
        if end:
            yield end
    except Exception as error:
        yield event(error_body(opaque(error, request_id), request_id))
    finally:
        first.cancel()
        await deltas.aclose()


class EventStream(Response):
    """Sends events as they come; when the client goes, or stops reading, the generator is closed at once.

    The server below waits in `send` while the client's buffers are full. After `stall_timeout_s` of that, `on_stall` is
    called and the answer ends unfinished, which closes the connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, stall_timeout_s: float, on_stall: Callable[[], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._writes = StallWatch(stall_timeout_s)
        self._on_stall = on_stall
        self._sent_at: float | None = None  # None until the headers are out
        # Proxies must pass each event on as it comes.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.create_task(self._send(send)),
            asyncio.create_task(_disconnected(receive)),
            asyncio.create_task(self._watch(send)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(*tasks)
            await self._events.aclose()
        for task in done:
            if (error := task.exception()) is not None:
                raise error

    async def _send(self, send: Send) -> None:
        self._writes.begin()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._sent_at = self._writes.end()
        async for chunk in self._events:
            self._writes.begin()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sent_at = self._writes.end()
        self._writes.begin()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, send: Send) -> None:
        """Ends when the client has stalled. Until then, a comment now and then while nothing else comes, so that nobody
        in between takes the line for dead."""
        while True:
            await asyncio.sleep(min(PING_S, self._writes.look_s))
            now = time.monotonic()
            if self._writes.is_stalled:
                self._on_stall()
                return
            if not self._writes.is_writing and self._sent_at is not None and now - self._sent_at >= PING_S:
                self._sent_at = now
                try:
                    async with asyncio.timeout(self._writes.timeout_s):
                        await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
                except TimeoutError:
                    self._on_stall()
                    return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
