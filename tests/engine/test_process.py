"""The engine as a process of its own: start, serve, die, hang, come back."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from peftserve.config import build
from peftserve.engine import client as client_module
from peftserve.engine.client import EngineClient, EngineState
from peftserve.engine.messages import AdapterResidency
from peftserve.errors import ConfigurationError, UnavailableError, UnsupportedModelError
from peftserve.types import AdapterKind, AdapterRef, EngineRequest, FinishReason, SamplingParams, TokenEvent

READY_S = 120.0


def make_client(checkpoint: Path, data_dir: Path, *, hang_timeout_s: float = 60.0, **settings: object) -> EngineClient:
    values = {
        "data_dir": str(data_dir),
        "dtype": "float32",
        "threads": 1,
        "kv_cache_bytes": "4MiB",
        "adapter_device_bytes": "1MiB",
        **settings,
    }
    return EngineClient(build(values).engine, checkpoint, hang_timeout_s=hang_timeout_s)


def make_request(request_id: str, *, max_tokens: int = 8, adapter: AdapterRef | None = None) -> EngineRequest:
    return EngineRequest(
        id=request_id,
        prompt_token_ids=[5, 6, 7],
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        adapter=adapter,
    )


async def events_of(client: EngineClient, request: EngineRequest) -> AsyncGenerator[TokenEvent, None]:
    """The request's events; closing the generator aborts it."""
    events: asyncio.Queue[TokenEvent] = asyncio.Queue()
    client.submit(request, events.put_nowait)
    try:
        while True:
            event = await events.get()
            yield event
            if event.finish_reason is not None:
                return
    finally:
        client.abort(request.id)


async def collect(events: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in events]


@pytest.fixture
async def client(tiny_checkpoint: Path, tmp_path: Path) -> AsyncIterator[EngineClient]:
    engine = make_client(tiny_checkpoint, tmp_path)
    await engine.start()
    yield engine
    await engine.stop()
    assert engine.pid is None


async def test_it_serves_many_at_once_and_reports_what_it_is(client: EngineClient) -> None:
    assert client.info is not None
    assert client.info.spec.name == "llama"
    answers = await asyncio.gather(*(collect(events_of(client, make_request(f"r{i}"))) for i in range(5)))
    tokens = [[t for event in events for t in event.token_ids] for events in answers]
    assert len(tokens[0]) == 8
    assert all(row == tokens[0] for row in tokens), "equal greedy requests got different tokens"
    assert all(events[-1].finish_reason is FinishReason.LENGTH for events in answers)
    assert client.stats.num_running == 0


async def test_an_abort_frees_everything_in_the_engine(client: EngineClient) -> None:
    events = events_of(client, make_request("r", max_tokens=400))
    await anext(events)
    await events.aclose()
    await collect(events_of(client, make_request("next")))
    assert (client.stats.num_running, client.stats.kv_pages_used) == (0, 0)


async def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(client: EngineClient) -> None:
    events = events_of(client, make_request("r", max_tokens=400))
    await anext(events)
    first = client.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    last = (await collect(events))[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert last.error.code == "engine_dead"
    await asyncio.sleep(0)
    if client.state is not EngineState.READY:
        with pytest.raises(UnavailableError, match="restarting") as caught:
            client.submit(make_request("early"), lambda event: None)
        assert caught.value.retry_after_s
    await client.wait_ready(READY_S)
    assert (client.restarts, client.pid == first) == (1, False)
    answer = await collect(events_of(client, make_request("after")))
    assert answer[-1].finish_reason is FinishReason.LENGTH


async def test_an_engine_that_hangs_is_killed_and_comes_back(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PING_S", 0.1)
    engine = make_client(tiny_checkpoint, tmp_path, hang_timeout_s=5.0)
    await engine.start()
    try:
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        events = await collect(events_of(engine, make_request("r")))
        assert events[-1].error is not None
        assert events[-1].error.code == "engine_dead"
        await engine.wait_ready(READY_S)
        assert engine.pid != pid
    finally:
        await engine.stop()


async def test_an_unknown_adapter_fails_its_request_with_the_reason(client: EngineClient) -> None:
    ghost = AdapterRef(digest="0" * 64, kind=AdapterKind.LORA, name="ghost", tenant="default")
    events = await collect(events_of(client, make_request("r", adapter=ghost)))
    assert events[-1].error is not None
    assert events[-1].error.code == "adapter_load_failed"
    assert "ghost" in events[-1].error.message


@pytest.mark.parametrize(
    ("settings", "adapter_dtype"),
    [
        ({"dtype": "bfloat16"}, "int8"),
        ({"dtype": "bfloat16", "adapter_dtype": "model"}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "adapter_dtype": "int8"}, "int8"),
    ],
)
async def test_how_it_keeps_adapters(
    settings: dict[str, str], adapter_dtype: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    engine = make_client(tiny_checkpoint, tmp_path, **settings)
    await engine.start()
    assert engine.info is not None
    assert (engine.info.dtype, engine.info.adapter_dtype) == (settings["dtype"], adapter_dtype)
    await engine.stop()


async def test_what_keeps_it_from_starting_is_raised(tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = make_client(tiny_checkpoint, tmp_path, max_model_len=100_000)
    with pytest.raises(ConfigurationError, match="max_model_len: 100000 exceeds the model's 512"):
        await engine.start()
    assert engine.state is EngineState.FAILED
    await engine.stop()

    engine = make_client(tiny_checkpoint, tmp_path, dtype="float32", int8_activations=True)
    with pytest.raises(ConfigurationError, match="int8_activations: they take bfloat16 activations, not float32"):
        await engine.start()
    await engine.stop()

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "gpt2"}')
    engine = make_client(empty, tmp_path)
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        await engine.start()
    await engine.stop()


async def test_a_signal_to_the_group_leaves_it_to_the_front_end(client: EngineClient) -> None:
    pid = client.pid
    assert pid is not None
    events = events_of(client, make_request("r", max_tokens=100))
    await anext(events)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert (await collect(events))[-1].finish_reason is FinishReason.LENGTH
    assert (client.pid, client.restarts) == (pid, 0)


async def test_files_of_the_current_directory_are_no_modules(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "torch", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    monkeypatch.chdir(tmp_path)
    engine = make_client(tiny_checkpoint, tmp_path)
    await engine.start()
    await engine.stop()


async def test_after_a_restart_it_tells_what_was_held_and_not_what_was_on_its_way(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    held: list[list[str]] = []
    engine = make_client(tiny_checkpoint, tmp_path)
    engine._on_ready = lambda info, before: held.append([ref.name for ref in before])
    await engine.start()
    for state in ("loading", "host", "device", "failed"):
        engine.residency[state] = AdapterResidency(
            digest=state,
            name=state,
            tenant="default",
            kind=AdapterKind.LORA,
            state=state,
            refs=0,
            pinned=False,
            host_bytes=0,
            device_bytes=0,
        )
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(READY_S):
        while engine.residency:  # nothing is shown as held by an engine that is no more  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await engine.wait_ready(READY_S)
    await engine.stop()
    assert held == [[], ["host", "device"]]
