"""The load tester against a real server over a scripted engine."""

import json
from typing import Any

import pytest
from safetensors.numpy import save

from peftserve.errors import EngineDeadError
from peftserve_client import AsyncClient, AsyncGrpcClient, RetryPolicy
from peftserve_client.loadtest import Plan, Report, Share, parse_mix, run
from tests.adapters.files import lora
from tests.scripted_server import ScriptedEngine, ScriptedServer

NEVER = RetryPolicy(attempts=1)


async def measure(server: ScriptedServer, plan: Plan, grpc: bool = False) -> Report:
    client: Any = AsyncGrpcClient(server.target, retry=NEVER) if grpc else AsyncClient(server.url, retry=NEVER)
    async with client:
        return await run(client, plan)


def test_a_mix_is_names_with_weights() -> None:
    assert parse_mix("law, art=2.5,base") == (Share("law"), Share("art", 2.5), Share(None))
    for text, fault in (("", "no adapter"), ("a=x", "must be a number"), ("a=0", "above 0"), ("a=nan", "above 0")):
        with pytest.raises(ValueError, match=fault):
            parse_mix(text)


@pytest.mark.parametrize("grpc", [False, True])
async def test_everything_is_counted(server: ScriptedServer, engine: ScriptedEngine, grpc: bool) -> None:
    config, arrays = lora()
    async with AsyncClient(server.url) as client:
        await client.adapters.push("law", (json.dumps(config).encode(), save(arrays)))
    engine.delay_s = 0.002
    plan = Plan(requests=30, concurrency=4, mix=parse_mix("law=2,base"), prompt_words=5, max_tokens=6)
    report = await measure(server, plan, grpc)
    assert report.output_tokens == report.overall.output_tokens == 30 * 6
    assert report.errors == {}
    assert [group.name for group in report.by_adapter] == ["law", "base"]
    assert [group.requests for group in report.by_adapter] == [20, 10]
    assert report.output_tokens_per_s == pytest.approx(180 / report.duration_s)
    overall = report.overall
    assert overall.ttft_ms is not None
    assert overall.itl_ms is not None
    assert overall.e2e_ms is not None
    assert 2 <= overall.ttft_ms.p50 <= overall.ttft_ms.p90 <= overall.ttft_ms.p99
    assert overall.e2e_ms.mean > overall.ttft_ms.mean + 4 * overall.itl_ms.mean
    prompts = [tuple(request.prompt_token_ids) for request in engine.requests]
    assert len(set(prompts)) == 30


async def test_the_number_of_streams_is_the_concurrency(server: ScriptedServer, engine: ScriptedEngine) -> None:
    engine.delay_s = 0.01
    most = 0

    def look(done: int) -> None:
        nonlocal most
        most = max(most, len(engine.running))

    async with AsyncClient(server.url, retry=NEVER) as client:
        await run(client, Plan(requests=12, concurrency=3, prompt_words=2, max_tokens=3), look)
    assert most <= 3


async def test_errors_are_counted_by_code(server: ScriptedServer, engine: ScriptedEngine) -> None:
    engine.fail_after, engine.error = 1, EngineDeadError("dead")
    report = await measure(server, Plan(requests=5, concurrency=2, mix=parse_mix("nope=1.5,base"), max_tokens=4))
    assert report.errors == {"adapter_not_found": 3, "engine_dead": 2}
    assert report.overall.errors == 5
    assert report.overall.e2e_ms is None
    assert report.requests_per_s == 0
