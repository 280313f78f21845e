"""The generating routes, whole and streamed; every answer held to the models of the OpenAPI document."""

import json
from typing import Any

import httpx
import pytest

from peftserve.api.http import responses
from peftserve.text.tokenizer import Tokenizer
from tests.adapters import files
from tests.api.conftest import MakeWorld, client_of
from tests.api.harness import World, add_adapter, dies, says

CHAT = [{"role": "user", "content": "Hi"}]


def events(response: httpx.Response) -> list[Any]:
    """The events of a streamed answer; `[DONE]` as it is."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_native(client: httpx.AsyncClient, world: World) -> None:
    digest = add_adapter(world, "mine", files.bottleneck())
    body = {"prompt": "Hi", "adapter_id": "mine", "sampling": {"logprobs": 1}}
    response = await client.post("/v1/generate", json=body, headers={"x-request-id": "abc-1"})
    answer = responses.GenerateResponse.model_validate(response.json())
    assert (answer.id, answer.model) == ("abc-1", "tiny-base")
    assert answer.adapter == responses.AdapterVersion(name="mine", kind="bottleneck", digest=digest)
    assert answer.choices[0].text == "hello world"
    assert answer.choices[0].logprobs is not None
    assert b"".join(bytes(entry.bytes) for entry in answer.choices[0].logprobs) == b"hello world"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_native_stream(client: httpx.AsyncClient) -> None:
    chunks = events(await client.post("/v1/generate", json={"prompt": "Hi", "stream": True, "sampling": {"n": 2}}))
    parsed = [responses.GenerateChunk.model_validate(chunk) for chunk in chunks]
    for index in range(2):
        assert "".join(chunk.text for chunk in parsed if chunk.index == index) == "hello world"
    assert [chunk.usage is not None for chunk in parsed] == [False] * (len(parsed) - 1) + [True]
    assert "adapter" in chunks[-1]


async def test_completion(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny-base", "prompt": ["a", "b"], "n": 2, "logprobs": 2, "max_tokens": 4}
    response = await client.post("/v1/completions", json=body)
    answer = responses.CompletionResponse.model_validate(response.json())
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(4)]


async def test_completion_stream(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny-base", "prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(await client.post("/v1/completions", json={**body, "logprobs": 0}))
    parsed = [responses.CompletionChunk.model_validate(chunk) for chunk in chunks]
    assert "".join(chunk.choices[0].text for chunk in parsed) == "hello world"
    assert parsed[-1].choices[0].finish_reason == "stop"
    offsets = [offset for chunk in parsed if (lp := chunk.choices[0].logprobs) for offset in lp.text_offset]
    assert offsets == sorted(set(offsets))
    assert usage["choices"] == []
    assert responses.CompletionChunk.model_validate(usage).usage is not None
    assert done == "[DONE]"


async def test_chat(client: httpx.AsyncClient, world: World) -> None:
    add_adapter(world, "mine")
    body = {"model": "mine", "messages": CHAT, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 60 - 40}
    response = await client.post("/v1/chat/completions", json=body)
    answer = responses.ChatResponse.model_validate(response.json())
    assert answer.model == "mine"
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert world.engine.requests[0].adapter is not None


async def test_chat_stream(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny-base", "messages": CHAT, "stream": True, "n": 2}
    *chunks, done = events(await client.post("/v1/chat/completions", json=body))
    parsed = [responses.ChatChunk.model_validate(chunk) for chunk in chunks]
    for index in range(2):
        of_index = [chunk.choices[0] for chunk in parsed if chunk.choices[0].index == index]
        assert of_index[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in of_index) == "hello world"
        assert [choice.finish_reason for choice in of_index if choice.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in parsed}) == 1
    assert all(chunk.usage is None for chunk in parsed)
    assert done == "[DONE]"


@pytest.mark.parametrize(("path", "extra"), [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {})])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_model_is_404_with_what_exists(
    client: httpx.AsyncClient, world: World, path: str, extra: dict[str, Any], stream: bool
) -> None:
    add_adapter(world, "haiku")
    body = {"model": "haikus", "stream": stream, **(extra or {"messages": CHAT})}
    response = await client.post(path, json=body)
    assert response.status_code == 404
    error = responses.ErrorAnswer.model_validate(response.json()).error
    assert (error.code, error.param) == ("adapter_not_found", "model")
    assert "haiku" in error.message
    assert "tiny-base" in error.message


@pytest.mark.parametrize("stream", [True, False])
async def test_faults_are_one_400(client: httpx.AsyncClient, stream: bool) -> None:
    body = {"prompt": "x", "sampling": {"max_tokens": -5, "top_p": 7}, "stream": stream, "junk": 1}
    response = await client.post("/v1/generate", json=body)
    assert response.status_code == 400
    error = responses.ErrorAnswer.model_validate(response.json()).error
    assert (error.type, error.code, error.param) == (
        "invalid_request_error",
        "invalid_request",
        "sampling.top_p",
    )
    assert len(error.faults) == 3
    assert error.request_id == response.headers["x-request-id"]


async def test_an_error_in_mid_stream_is_an_event_and_the_end(make: MakeWorld) -> None:
    async with client_of(make(dies)) as client:
        for path, body in (
            ("/v1/generate", {"prompt": "x"}),
            ("/v1/completions", {"model": "tiny-base", "prompt": "x"}),
            ("/v1/chat/completions", {"model": "tiny-base", "messages": CHAT}),
        ):
            *chunks, last = events(await client.post(path, json={**body, "stream": True}))
            assert chunks
            error = responses.ErrorAnswer.model_validate(last).error
            assert error.code == "engine_dead"


async def test_an_error_in_a_whole_answer_is_503_with_retry_after(make: MakeWorld) -> None:
    async with client_of(make(dies)) as client:
        response = await client.post("/v1/generate", json={"prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"


async def test_text_survives_the_stream(make: MakeWorld, tokenizer: Tokenizer) -> None:
    text = 'é😀 "quoted"\n\ndata: [DONE]\u2028\x00'
    async with client_of(make(says(tokenizer, text))) as client:
        chunks = events(await client.post("/v1/generate", json={"prompt": "x", "stream": True}))
    assert "".join(chunk["text"] for chunk in chunks) == text
