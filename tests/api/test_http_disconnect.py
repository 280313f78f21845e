"""Over real sockets: a client that goes away frees its request at once, and a slow start still gets headers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from peftserve.api.http import sse
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import EngineRequest, FinishReason, TokenEvent
from tests.api.conftest import MakeWorld
from tests.api.harness import endless, eventually, says, serving, silent

BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "x"},
    "/v1/completions": {"model": "tiny-base", "prompt": "x", "n": 2},
    "/v1/chat/completions": {"model": "tiny-base", "messages": [{"role": "user", "content": "Hi"}]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("script", [endless, silent])
@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_aborts(make: MakeWorld, path: str, script: Any, stream: bool) -> None:
    world = make(script)
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        asked = asyncio.create_task(client.post(path, json={**BODIES[path], "stream": stream}))
        expected = 2 if path == "/v1/completions" else 1
        await eventually(lambda: len(world.engine.requests) == expected)
        await asyncio.sleep(0.02)
        asked.cancel()
        await eventually(lambda: len(world.engine.aborted) == expected)
        assert world.services.generation.num_sequences == 0


async def test_leaving_in_mid_stream_aborts(make: MakeWorld) -> None:
    world = make(endless)
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"prompt": "x", "stream": True}
        async with client.stream("POST", "/v1/generate", json=body) as response:
            await anext(response.aiter_lines())
        await eventually(lambda: len(world.engine.aborted) == 1)


async def test_a_reader_that_stopped_reading_aborts_when_it_leaves(make: MakeWorld) -> None:
    """The server waits in `send` then, not for the engine."""

    async def flood(request: EngineRequest) -> AsyncIterator[TokenEvent]:
        while True:
            yield TokenEvent(request_id=request.id, token_ids=[70] * 200)
            await asyncio.sleep(0)

    world = make(flood)
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", "/v1/generate", json={"prompt": "x", "stream": True}):
            await asyncio.sleep(0.3)
        await eventually(lambda: len(world.engine.aborted) == 1)
        assert world.services.generation.num_sequences == 0


async def test_a_reader_that_stays_but_does_not_read_is_aborted(make: MakeWorld) -> None:
    async def flood(request: EngineRequest) -> AsyncIterator[TokenEvent]:
        while True:
            yield TokenEvent(request_id=request.id, token_ids=[70] * 2000)
            await asyncio.sleep(0)

    world = make(flood, stream_stall_timeout_s=0.2)
    value = world.services.metrics.registry.get_sample_value
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", "/v1/generate", json={"prompt": "x", "stream": True}) as response:
            await eventually(lambda: len(world.engine.aborted) == 1)
            assert world.services.generation.num_sequences == 0
            assert value("peftserve_streams_stalled_total", {"door": "http"}) == 1
            with pytest.raises(httpx.RemoteProtocolError):  # the answer has no end
                await response.aread()
        assert (await client.get("/livez")).status_code == 200


async def test_a_slow_engine_is_no_stalled_reader(make: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.02)

    async def slow(request: EngineRequest) -> AsyncIterator[TokenEvent]:
        yield TokenEvent(request_id=request.id, token_ids=[70])
        await asyncio.sleep(0.2)
        yield TokenEvent(request_id=request.id, token_ids=[70], finish_reason=FinishReason.LENGTH)

    world = make(slow, stream_stall_timeout_s=0.05)
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/generate", json={"prompt": "x", "stream": True})
    assert '"finish_reason":"length"' in response.text
    assert world.engine.aborted == []


async def test_headers_and_pings_come_before_a_late_first_token(
    make: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "HEADERS_AFTER_S", 0.02)
    monkeypatch.setattr(sse, "PING_S", 0.05)
    go = asyncio.Event()

    async def late(request: EngineRequest) -> AsyncIterator[TokenEvent]:
        await go.wait()
        yield TokenEvent(request_id=request.id, token_ids=[70], finish_reason=FinishReason.LENGTH)

    world = make(late)
    async with (
        serving(world) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", "/v1/generate", json={"prompt": "x", "stream": True}) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert await anext(lines) == ": ping"
        go.set()
        rest = [line async for line in lines]
    assert [line for line in rest if line.startswith("data: ")][-1].startswith('data: {"id":')


async def test_many_at_once(make: MakeWorld, tokenizer: Tokenizer) -> None:
    world = make(says(tokenizer, "hello world"))
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        bodies = [{"prompt": "x", "stream": i % 2 == 0} for i in range(64)]
        answers = await asyncio.gather(*(client.post("/v1/generate", json=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert len(world.engine.requests) == 64
    assert world.engine.aborted == []


async def test_a_large_upload_that_is_refused_gets_its_answer(make: MakeWorld) -> None:
    """Over a socket the client is still sending when the answer comes."""
    world = make(max_adapter_bytes=1024)
    async with serving(world) as url, httpx.AsyncClient(base_url=url) as client:
        parts = {"weights": ("w", bytes(8 * 2**20))}
        response = await client.put("/v1/adapters/mine", files=parts)
        assert response.status_code == 413
        assert (await client.get("/livez")).status_code == 200
