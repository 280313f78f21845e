"""What must not break the server: a killed engine, clients that vanish, adapters that change while they are used."""

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from peftserve_client import ApiError, AsyncClient, AsyncGrpcClient, Client, EngineDeadError, NotFoundError
from tests.model import oracle
from tests.server.process import ServerProcess, running_server, wait_until

pytestmark = pytest.mark.usefixtures("uploaded")

PROMPT = [5, 9, 17, 30, 42]


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back_with_its_adapters(
    server: ServerProcess, client: Client, uploaded: list[str]
) -> None:
    before = client.generate(PROMPT, adapter_id="lora-r8", max_tokens=6, temperature=0.0).choices[0].token_ids
    chunks = client.stream(PROMPT, adapter_id="lora-r8", max_tokens=240, ignore_eos=True)
    next(iter(chunks))
    server.engine().send_signal(signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        list(chunks)
    seen = []

    def back() -> bool:
        seen.append(httpx.get(f"{server.http}/readyz").status_code)
        return len(seen) > 1 and seen[-1] == 200

    wait_until(back, what="readiness")
    assert 503 in seen
    assert httpx.get(f"{server.http}/livez").status_code == 200
    assert {adapter.adapter_id for adapter in client.adapters.list()} == set(uploaded)
    after = client.generate(PROMPT, adapter_id="lora-r8", max_tokens=6, temperature=0.0).choices[0].token_ids
    assert after == before


async def abandon(client: AsyncClient | AsyncGrpcClient, adapter_id: str | None, rng: random.Random) -> None:
    """Start an answer at some time and go away at some other: between tokens, or while it waits."""
    await asyncio.sleep(rng.random() * 4)
    prompt = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 60))]
    stream = client.stream(prompt, adapter_id=adapter_id, max_tokens=90, ignore_eos=True, n=rng.choice([1, 3]))
    try:
        async with asyncio.timeout(rng.random() * 2):
            async for _ in stream:
                if rng.random() < 0.05:
                    break
    except (TimeoutError, ApiError):
        pass
    finally:
        await stream.aclose()


async def abandon_200(server: ServerProcess, adapter_ids: list[str]) -> None:
    rng = random.Random(7)
    async with AsyncClient(server.http) as over_http, AsyncGrpcClient(server.grpc) as over_grpc:
        clients = [over_http, over_grpc]
        await asyncio.gather(
            *(abandon(clients[index % 2], rng.choice([None, *adapter_ids]), rng) for index in range(200))
        )


def test_200_aborts_and_disconnects_leave_nothing_behind(
    server: ServerProcess, client: Client, uploaded: list[str], record_property: Callable[[str, object], None]
) -> None:
    def is_idle() -> bool:
        return all(server.gauge(f"vllm:num_requests_{state}") == 0 for state in ("running", "waiting"))

    def references() -> int:
        return sum(adapter.residency.refs for adapter in client.adapters.list() if adapter.residency)

    client.generate(PROMPT, max_tokens=2)  # the engine's own first-use allocations are no leak
    engine = server.engine()
    memory_before = engine.memory_info().rss / 2**20
    aborted_before = server.gauge("vllm:request_success_total")
    asyncio.run(abandon_200(server, uploaded))
    wait_until(is_idle, what="an idle server")
    wait_until(lambda: references() == 0, what="no adapter in use")
    memory_after = engine.memory_info().rss / 2**20
    record_property("engine_rss_mib", {"before": memory_before, "after": memory_after})
    print(f"engine RSS: {memory_before:.0f} MiB before, {memory_after:.0f} MiB after")  # noqa: T201
    assert server.gauge("vllm:request_success_total") > aborted_before

    prefixes = [adapter.details["num_virtual_tokens"] for adapter in client.adapters.list() if adapter.kind == "prefix"]
    assert len(prefixes) == 5
    prefix_pages = sum(-(-int(tokens) // 4) for tokens in prefixes)
    assert server.gauge("peftserve_kv_pages_used") <= prefix_pages, "only resident prefixes may hold KV pages"
    assert memory_after - memory_before < 64
    assert client.generate(PROMPT, max_tokens=2).usage.completion_tokens == 2


def test_an_adapter_is_replaced_and_deleted_while_it_is_used(
    server: ServerProcess, client: Client, adapter_folders: dict[str, Path]
) -> None:
    first = client.adapters.push("moving", adapter_folders["lora-r4"])
    old = client.generate(PROMPT, adapter_id="lora-r4", max_tokens=60, temperature=0.0, ignore_eos=True)
    new = client.generate(PROMPT, adapter_id="lora-r64", max_tokens=60, temperature=0.0, ignore_eos=True)
    stream = iter(client.stream(PROMPT, adapter_id="moving", max_tokens=60, temperature=0.0, ignore_eos=True))
    tokens = list(next(stream).token_ids)
    second = client.adapters.push("moving", adapter_folders["lora-r64"])
    assert second.digest != first.digest
    after = client.generate(PROMPT, adapter_id="moving", max_tokens=60, temperature=0.0, ignore_eos=True)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == old.choices[0].token_ids, "a request in flight must keep the version that it started with"
    assert after.choices[0].token_ids == new.choices[0].token_ids
    by_digest = client.generate(
        PROMPT, adapter_id=f"moving@sha256:{first.digest}", max_tokens=60, temperature=0.0, ignore_eos=True
    )
    assert by_digest.choices[0].token_ids == old.choices[0].token_ids

    stream = iter(client.stream(PROMPT, adapter_id="moving", max_tokens=60, temperature=0.0, ignore_eos=True))
    tokens = list(next(stream).token_ids)
    client.adapters.delete("moving")
    with pytest.raises(NotFoundError, match="moving"):
        client.generate(PROMPT, adapter_id="moving", max_tokens=1)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == new.choices[0].token_ids


def test_the_openai_package_lists_models_and_streams_a_chat_with_an_adapter(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    lora = oracle.save_lora(oracle.load_base(tiny_checkpoint), tmp_path / "lora", rank=16, targets="all", seed=1)
    with (
        running_server(tiny_checkpoint, tmp_path, threads=1, kv_cache_bytes="4MiB") as server,
        Client(server.http) as client,
        OpenAI(base_url=f"{server.http}/v1", api_key="unused") as openai,
    ):
        client.adapters.push("lora-r16", lora)
        models = [model.id for model in openai.models.list()]
        assert models == ["llama", "lora-r16"]
        messages = [{"role": "user", "content": "a"}]
        deltas = [
            chunk.choices[0].delta.content or ""
            for chunk in openai.chat.completions.create(
                model="lora-r16", messages=messages, max_tokens=8, temperature=0, stream=True
            )
            if chunk.choices
        ]
        whole = openai.chat.completions.create(model="lora-r16", messages=messages, max_tokens=8, temperature=0)
        assert "".join(deltas) == whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 8


def test_adapters_survive_a_restart_and_sigterm_lets_running_requests_finish(
    base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"dtype": "float32", "threads": 1, "kv_cache_bytes": "4MiB"}
    with running_server(base_folder, tmp_path, **settings) as server, Client(server.http) as client:
        client.adapters.push("kept", adapter_folders["houlsby"])
        client.adapters.pin("kept")
        expected = client.generate(PROMPT, adapter_id="kept", max_tokens=40, temperature=0.0, ignore_eos=True)
        stream = iter(client.stream(PROMPT, adapter_id="kept", max_tokens=40, temperature=0.0, ignore_eos=True))
        tokens = list(next(stream).token_ids)
        os.kill(server.process.pid, signal.SIGTERM)
        tokens += [token for chunk in stream for token in chunk.token_ids]
        assert tokens == expected.choices[0].token_ids
        engine = server.engine().pid if server.process.poll() is None else None
        server.process.wait(60)
        assert engine is None or not psutil.pid_exists(engine)
    with running_server(base_folder, tmp_path, **settings) as server, Client(server.http) as client:
        kept = client.adapters.get("kept")
        assert kept.pinned
        wait_until(lambda: (client.adapters.get("kept").residency or kept).state == "device", what="the pinned adapter")
        again = client.generate(PROMPT, adapter_id="kept", max_tokens=40, temperature=0.0, ignore_eos=True)
        assert again.choices[0].token_ids == expected.choices[0].token_ids
