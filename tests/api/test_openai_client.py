"""The official `openai` package, unchanged, against our routes."""

from collections.abc import AsyncIterator

import openai
import pytest

from tests.api.conftest import MakeWorld
from tests.api.harness import World, add_adapter, dies, serving


@pytest.fixture
async def client(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with serving(world) as url, openai_client(url) as client:
        yield client


def openai_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


async def test_models(client: openai.AsyncOpenAI, world: World) -> None:
    add_adapter(world, "mine")
    assert [model.id async for model in client.models.list()] == ["tiny-base", "mine"]
    assert (await client.models.retrieve("mine")).owned_by == "peftserve"


async def test_chat_with_an_adapter_as_model(client: openai.AsyncOpenAI, world: World) -> None:
    digest = add_adapter(world, "mine")
    answer = await client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "Hi"}], seed=1)
    assert answer.choices[0].message.content == "hello world"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert [r.adapter and r.adapter.digest for r in world.engine.requests] == [digest]


async def test_streamed_chat(client: openai.AsyncOpenAI, world: World) -> None:
    add_adapter(world, "mine")
    stream = await client.chat.completions.create(
        model="mine",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = [chunk async for chunk in stream]
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "hello world"
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_streamed_completion(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="tiny-base", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world"


async def test_errors_are_the_packages_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
    assert (missing.value.code, missing.value.param) == ("adapter_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="not supported by this server: tools"):
        await client.chat.completions.create(
            model="tiny-base",
            messages=[{"role": "user", "content": "Hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


async def test_an_error_in_mid_stream_raises(make: MakeWorld) -> None:
    async with serving(make(dies)) as url, openai_client(url) as client:
        stream = await client.completions.create(model="tiny-base", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="engine stopped"):
            [chunk async for chunk in stream]
