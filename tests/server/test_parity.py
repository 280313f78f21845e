"""The whole server against the real oracles, over both protocols, alone and in one mixed batch, cache cold and warm."""

import asyncio

import pytest

from peftserve_client import AsyncClient, AsyncGrpcClient, Client, Result
from tests.model.parity import TOLERANCE
from tests.server.conftest import Case
from tests.server.process import ServerProcess

pytestmark = pytest.mark.usefixtures("uploaded")


def check(result: Result, case: Case) -> None:
    """Same greedy tokens, every top-5 log-probability of the oracle within the tolerance."""
    choice = result.choices[0]
    assert choice.token_ids == list(case.expected.tokens), case.adapter_id
    assert choice.logprobs is not None
    for position, ids, values in zip(choice.logprobs, case.expected.top_ids, case.expected.top_logprobs, strict=True):
        reported = {token.token_id: token.logprob for token in position.top}
        for token, value in zip(ids, values, strict=True):
            assert abs(reported[token] - value) < TOLERANCE, (case.adapter_id, token)


async def ask(client: AsyncClient | AsyncGrpcClient, case: Case) -> Result:
    return await client.generate(
        case.prompt,
        adapter_id=case.adapter_id,
        max_tokens=len(case.expected.tokens),
        temperature=0.0,
        logprobs=8,
        ignore_eos=True,
    )


def test_each_alone(client: Client, cases: list[Case]) -> None:
    for case in cases:
        result = client.generate(
            case.prompt,
            adapter_id=case.adapter_id,
            max_tokens=len(case.expected.tokens),
            temperature=0.0,
            logprobs=8,
            ignore_eos=True,
        )
        check(result, case)
        assert (result.adapter.name if result.adapter else None) == case.adapter_id


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_all_kinds_at_once(server: ServerProcess, cases: list[Case], protocol: str) -> None:
    assert len(cases) >= 12
    assert {case.adapter_id.split("-")[0] if case.adapter_id else None for case in cases} == {
        *(None, "lora", "dora", "prefix", "prompt", "p", "pfeiffer", "houlsby", "parallel")
    }
    client = AsyncClient(server.http) if protocol == "http" else AsyncGrpcClient(server.grpc)
    async with client:
        cold = await asyncio.gather(*(ask(client, case) for case in cases))
        warm = await asyncio.gather(*(ask(client, case) for case in cases))
    for results in (cold, warm):
        for result, case in zip(results, cases, strict=True):
            check(result, case)
    long = [result.usage.cached_tokens for result, case in zip(warm, cases, strict=True) if len(case.prompt) > 8]
    assert long
    assert all(long), "a repeated prompt was not answered from the prefix cache"
