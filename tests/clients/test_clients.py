"""The four clients against both real doors: the same calls, the same results, the same errors."""

import asyncio
import json
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

import peftserve_client as pc
from peftserve.engine.client import EngineState
from peftserve.errors import EngineDeadError
from tests.adapters.files import lora
from tests.clients.conftest import CLIENTS, make_client
from tests.scripted_server import MODEL, ScriptedEngine, ScriptedServer
from tests.scripted_thread import serve_in_thread


def files(seed: int = 0) -> tuple[bytes, bytes]:
    config, arrays = lora(seed=seed)
    return json.dumps(config).encode(), save(arrays)


async def test_generate_gives_the_whole_answer(client: Any) -> None:
    result = await client.generate("héllo", max_tokens=8, n=2, logprobs=1, temperature=0)
    assert [choice.text for choice in result.choices] == ["héllo  "] * 2
    assert result.text == "héllo  "
    choice = result.choices[1]
    assert choice.index == 1
    assert choice.finish_reason == "length"
    assert choice.token_ids == [*"héllo".encode(), 32, 32]
    assert [token.bytes for token in choice.logprobs] == [[token] for token in choice.token_ids]
    assert choice.logprobs[0].top[0].logprob == -0.5
    assert result.usage == pc.Usage(prompt_tokens=6, completion_tokens=16)
    assert result.usage.total_tokens == 22
    assert result.timings.total_s >= result.timings.first_token_s > 0
    assert result.adapter is None
    assert result.id


async def test_stream_gives_the_same_in_pieces(client: Any) -> None:
    chunks = [chunk async for chunk in client.stream("hi", max_tokens=3)]
    assert "".join(chunk.text for chunk in chunks) == "hi "
    assert len(chunks) > 1  # tokens that come faster than they are sent share a chunk
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_every_sort_of_prompt(client: Any, engine: ScriptedEngine) -> None:
    assert (await client.generate([72, 105], max_tokens=2)).text == "Hi"
    assert (await client.chat("hey", system="be kind", max_tokens=25)).text == "system:be kind;user:hey; "
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert (await client.generate(messages, max_tokens=19)).text == "user:a;assistant:b;"


async def test_every_sampling_field_reaches_the_engine(client: Any, engine: ScriptedEngine) -> None:
    wanted: dict[str, Any] = {
        "max_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.125,
        "seed": 2**62,
        "repetition_penalty": 1.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {5: -1.5},
        "stop_token_ids": frozenset([9]),
        "ignore_eos": True,
        "logprobs": 0,
    }
    await client.generate("abc", **wanted)
    sampling = engine.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in wanted} == wanted


async def test_stop_strings(client: Any) -> None:
    result = await client.generate("one, two", max_tokens=8, stop=", ")
    assert result.text == "one"
    assert (result.choices[0].finish_reason, result.choices[0].stop_reason) == ("stop", ", ")
    result = await client.generate("one, two", max_tokens=8, stop=[", "], include_stop_str_in_output=True)
    assert result.text == "one, "


async def test_adapters_from_upload_to_delete(client: Any, engine: ScriptedEngine) -> None:
    config, weights = files()
    seen: list[tuple[int, int]] = []
    pushed = await client.adapters.push("law", (config, weights), progress=lambda *step: seen.append(step))
    assert (pushed.adapter_id, pushed.kind, pushed.pinned) == ("law", "lora", False)
    assert pushed.details["rank"] == 4
    assert seen[-1] == (len(config) + len(weights),) * 2
    assert pushed.residency is not None
    assert abs(pushed.created_at.timestamp() - time.time()) < 60

    again = await client.adapters.push("law", (config, weights))
    assert again.digest == pushed.digest
    newer = await client.adapters.push("law", files(seed=1))
    assert newer.digest != pushed.digest
    assert (await client.adapters.get("law")).digest == newer.digest

    result = await client.generate("x", adapter_id="law", max_tokens=1)
    assert result.adapter == pc.AdapterVersion("law", "lora", newer.digest)
    old = await client.generate("x", adapter_id=f"law@sha256:{pushed.digest}", max_tokens=1)
    assert old.adapter.digest == pushed.digest

    await client.adapters.push("art", files())
    assert [adapter.adapter_id for adapter in await client.adapters.list()] == ["art", "law"]
    pinned = await client.adapters.pin("art")
    assert pinned.pinned
    assert pinned.residency.state == "device"
    assert not (await client.adapters.pin("art", pinned=False)).pinned

    await client.adapters.delete("law")
    with pytest.raises(pc.AdapterNotFoundError):
        await client.adapters.get("law")


async def test_push_reads_a_folder(client: Any, tmp_path: Path) -> None:
    config, weights = files()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert (await client.adapters.push("law", folder)).kind == "lora"


async def test_errors_carry_what_the_server_said(client: Any) -> None:
    with pytest.raises(pc.InvalidRequestError, match="top_p") as caught:
        await client.generate("x", top_p=3.0, n=0)
    error = caught.value
    assert error.code == "invalid_request"
    assert error.status in (400, "INVALID_ARGUMENT")
    assert error.field == "sampling.top_p"
    assert len(error.faults) == 2
    assert error.faults[1].startswith("sampling.n: ")
    assert error.request_id


async def test_each_error_has_its_class(client: Any) -> None:
    with pytest.raises(pc.PromptTooLongError):
        await client.generate("x" * 600)
    with pytest.raises(pc.AdapterNotFoundError) as missing:
        await client.generate("x", adapter_id="nope")
    assert missing.value.field == "adapter_id"
    with pytest.raises(pc.InvalidAdapterError) as refused:
        await client.adapters.push("law", (b"{}", b"no safetensors"))
    assert refused.value.faults
    with pytest.raises(pc.InvalidRequestError):
        await client.adapters.push("Not A Name", files())
    with pytest.raises(TypeError, match="max_toks"):
        await client.generate("x", max_toks=1)


async def test_an_engine_error_ends_the_stream_and_is_not_retried(client: Any, engine: ScriptedEngine) -> None:
    engine.fail_after, engine.error = 2, EngineDeadError("the engine died", retry_after_s=1.0)
    got: list[str] = []

    async def read() -> None:
        async for chunk in client.stream("abc", max_tokens=9):
            got.append(chunk.text)

    with pytest.raises(pc.EngineDeadError, match="the engine died"):
        await read()
    assert "".join(got) == "ab"
    assert len(engine.requests) == 1


async def test_leaving_a_stream_aborts_it_in_the_engine(client: Any, engine: ScriptedEngine) -> None:
    engine.delay_s = 0.01
    async with aclosing(client.stream("abc", max_tokens=400)) as chunks:
        await anext(chunks)
    await _until(lambda: len(engine.aborted) == 1)
    assert not engine.running


async def test_health_and_readiness(client: Any, engine: ScriptedEngine) -> None:
    assert await client.health()
    await _until_async(client.ready)
    engine.state = EngineState.RESTARTING

    async def is_unready() -> bool:
        return not await client.ready()

    await _until_async(is_unready)
    assert await client.health()


@pytest.mark.parametrize("kind", ["http", "http-async"])
async def test_models(kind: str, server: ScriptedServer) -> None:
    client = make_client(kind, server)
    await client.adapters.push("law", files())
    assert [(model.id, model.parent) for model in await client.models()] == [(MODEL, None), ("law", MODEL)]
    await client.close()


@pytest.mark.parametrize("kind", CLIENTS)
async def test_api_keys_separate_tenants(kind: str, tmp_path: Path) -> None:
    with serve_in_thread(tmp_path, api_keys={"key-a": "a", "key-b": "b"}) as server:
        nobody, wrong = make_client(kind, server), make_client(kind, server, api_key="no")
        a, b = make_client(kind, server, api_key="key-a"), make_client(kind, server, api_key="key-b")
        for stranger in (nobody, wrong):
            with pytest.raises(pc.AuthenticationError):
                await stranger.generate("x")
            assert await stranger.health()
        await a.adapters.push("law", files())
        assert await b.adapters.list() == []
        with pytest.raises(pc.AdapterNotFoundError):
            await b.generate("x", adapter_id="law")
        for client in (nobody, wrong, a, b):
            await client.close()


@pytest.mark.parametrize("kind", CLIENTS)
async def test_timeouts(kind: str, server: ScriptedServer, engine: ScriptedEngine) -> None:
    engine.delay_s = 5.0
    client = make_client(kind, server, retry=pc.RetryPolicy(attempts=1))
    with pytest.raises((pc.RequestTimeoutError, pc.DeadlineExceededError)):
        await client.generate("x", max_tokens=2, timeout_s=0.2)
    await _until(lambda: len(engine.aborted) == 1)
    await client.close()


@pytest.mark.parametrize("kind", CLIENTS)
async def test_nobody_there(kind: str) -> None:
    nowhere = ScriptedServer(None, None, None, url="http://127.0.0.1:9", target="127.0.0.1:9")  # type: ignore[arg-type]
    client = make_client(kind, nowhere, retry=pc.RetryPolicy(attempts=2, first_wait_s=0.01))
    with pytest.raises(pc.ConnectionFailedError, match=r"127\.0\.0\.1:9"):
        await client.generate("x")
    assert not await client.health()
    await client.close()


async def _until(condition: Any) -> None:
    async def check() -> bool:
        return bool(condition())

    await _until_async(check)


async def _until_async(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not await condition():
        assert time.monotonic() < deadline, "did not happen within 5 s"
        await asyncio.sleep(0.01)
