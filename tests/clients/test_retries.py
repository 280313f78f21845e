"""Retries against a local server that fails as it is told."""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import peftserve_client as pc
from peftserve.api.grpc.errors import to_status
from peftserve.errors import OverloadedError
from peftserve_client.retry import RetryPolicy
from peftserve_proto.v1 import inference_pb2, inference_pb2_grpc

QUICK = RetryPolicy(attempts=4, first_wait_s=0.01, max_wait_s=2.0)
RESULT = {
    "id": "1",
    "choices": [{"index": 0, "text": "ok", "token_ids": [1], "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}
LAST = {"id": "1", "index": 0, "text": "ok", "finish_reason": "stop", "usage": RESULT["usage"]}
ADAPTER = {
    "adapter_id": "a",
    "kind": "lora",
    "digest": "d",
    "pinned": False,
    "created_at": "2026-01-01T00:00:00Z",
    "size_bytes": 1,
}


class Flaky:
    """Answers each request by the next of `script`: a status, an action, or "ok" when it has run out."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.times: list[float] = []
        self.bodies: list[bytes] = []
        self.url = ""

    async def answer(self, request: Request) -> Response:
        self.times.append(time.monotonic())
        self.bodies.append(await request.body())
        step = self.script.pop(0) if self.script else "ok"
        if isinstance(step, tuple):
            status, headers = step
            error: dict[str, Any] = {
                "message": f"status {status}",
                "code": None,
                "param": None,
                "faults": [],
                "request_id": "r1",
            }
            return JSONResponse({"error": error}, status, headers)
        if step == "page":
            return Response("<html>Bad gateway</html>", 503, media_type="text/html")
        if step == "foreign":
            return JSONResponse({"id": "1"})
        if request.method == "PUT":
            return JSONResponse(ADAPTER)
        if not json.loads(self.bodies[-1])["stream"]:
            return JSONResponse(RESULT)
        return StreamingResponse(_events(cut=step == "cut"), media_type="text/event-stream")


async def _events(*, cut: bool) -> AsyncIterator[bytes]:
    yield b": ping\n\n"
    yield b'data: {"id": "1", "index": 0, "text": "o"}\n\n'
    if not cut:
        yield b"data: " + json.dumps(LAST).encode() + b"\n\n"


@pytest.fixture(scope="module")
def flaky_server() -> Iterator[Flaky]:
    flaky = Flaky()
    routes = [Route("/{path:path}", flaky.answer, methods=["GET", "POST", "PUT"])]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    flaky.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield flaky
    server.should_exit = True
    thread.join()


@pytest.fixture
def flaky(flaky_server: Flaky) -> Flaky:
    flaky_server.script, flaky_server.times, flaky_server.bodies = [], [], []
    return flaky_server


async def ask(kind: str, url: str, how: str, retry: RetryPolicy = QUICK) -> Any:
    """One call by a client of this kind; a stream's chunks are joined."""
    if kind == "sync":
        return await asyncio.to_thread(_ask_sync, url, how, retry)
    async with pc.AsyncClient(url, retry=retry) as client:
        if how == "stream":
            return "".join([chunk.text async for chunk in client.stream("x")])
        if how == "push":
            return await client.adapters.push("a", (b"{}", b"weights"))
        return (await client.generate("x")).text


def _ask_sync(url: str, how: str, retry: RetryPolicy) -> Any:
    with pc.Client(url, retry=retry) as client:
        if how == "stream":
            return "".join(chunk.text for chunk in client.stream("x"))
        if how == "push":
            return client.adapters.push("a", (b"{}", b"weights"))
        return client.generate("x").text


BOTH = pytest.mark.parametrize("kind", ["sync", "async"])


@BOTH
@pytest.mark.parametrize("how", ["generate", "stream"])
async def test_overload_and_unavailability_are_retried(kind: str, how: str, flaky: Flaky) -> None:
    flaky.script = [(429, {}), (503, {}), "page"]
    assert (await ask(kind, flaky.url, how)) in ("ok", "ook")
    assert len(flaky.times) == 4


@BOTH
async def test_retry_after_is_waited_out(kind: str, flaky: Flaky) -> None:
    flaky.script = [(429, {"retry-after": "1"})]
    assert await ask(kind, flaky.url, "generate") == "ok"
    assert 1.0 <= flaky.times[1] - flaky.times[0] < 1.6


@BOTH
async def test_a_long_retry_after_is_the_callers_business(kind: str, flaky: Flaky) -> None:
    flaky.script = [(503, {"retry-after": "60"})]
    with pytest.raises(pc.UnavailableError) as caught:
        await ask(kind, flaky.url, "generate")
    assert caught.value.retry_after_s == 60.0
    assert caught.value.request_id == "r1"
    assert len(flaky.times) == 1


@BOTH
@pytest.mark.parametrize("status", [400, 404, 409, 413, 500, 504])
async def test_other_errors_are_not_retried(kind: str, status: int, flaky: Flaky) -> None:
    flaky.script = [(status, {})]
    with pytest.raises(pc.ApiError) as caught:
        await ask(kind, flaky.url, "stream")
    assert caught.value.status == status
    assert len(flaky.times) == 1


@BOTH
async def test_the_last_error_comes_out(kind: str, flaky: Flaky) -> None:
    flaky.script = [(503, {})] * 9
    with pytest.raises(pc.UnavailableError):
        await ask(kind, flaky.url, "generate")
    assert len(flaky.times) == QUICK.attempts


@BOTH
async def test_a_cut_stream_is_not_repeated_after_its_first_token(kind: str, flaky: Flaky) -> None:
    flaky.script = ["cut"]
    with pytest.raises(pc.ConnectionFailedError, match="before the answer was complete"):
        await ask(kind, flaky.url, "stream")
    assert len(flaky.times) == 1


@BOTH
async def test_a_server_that_hangs_up_is_named_and_asked_again(kind: str) -> None:
    asked = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        # The body too: what is unread when a socket is closed makes a reset of the hanging up.
        asked.append(await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0])))
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(pc.ConnectionFailedError, match=rf"127\.0\.0\.1:{port}: Server disconnected"):
            await ask(kind, f"http://127.0.0.1:{port}", "generate")
    assert len(asked) == QUICK.attempts


@BOTH
async def test_an_upload_is_sent_again_from_its_start(kind: str, flaky: Flaky) -> None:
    flaky.script = [(503, {})]
    await ask(kind, flaky.url, "push")
    first, second = flaky.bodies
    assert b"weights" in first
    assert second.count(b"adapter_model.safetensors") == 1
    assert len(first) == len(second)


@BOTH
async def test_an_answer_that_is_none_of_ours(kind: str, flaky: Flaky) -> None:
    flaky.script = ["foreign"]
    with pytest.raises(pc.ProtocolError, match="choices"):
        await ask(kind, flaky.url, "generate")
    assert len(flaky.times) == 1


@BOTH
async def test_grpc_retries_what_the_server_says_to_retry(kind: str) -> None:
    service = _FlakyInference([OverloadedError("queue full", retry_after_s=0.2)])
    server = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        if kind == "sync":
            with pc.GrpcClient(target, retry=QUICK) as client:
                result = await asyncio.to_thread(client.generate, "x")
        else:
            async with pc.AsyncGrpcClient(target, retry=QUICK) as async_client:
                result = await async_client.generate("x")
    finally:
        server.stop(0).wait()
    assert result.text == "ok"
    assert 0.2 <= service.times[1] - service.times[0] < 0.8


class _FlakyInference(inference_pb2_grpc.InferenceServicer):
    def __init__(self, errors: list[OverloadedError]) -> None:
        self.errors = errors
        self.times: list[float] = []

    def Generate(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateResponse]:  # noqa: N802
        self.times.append(time.monotonic())
        if self.errors:
            context.abort_with_status(to_status(self.errors.pop(), "r1"))
        yield inference_pb2.GenerateResponse(
            text="ok", finish_reason=inference_pb2.FINISH_REASON_STOP, summary=inference_pb2.Summary()
        )
