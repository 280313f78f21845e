"""OpenAI's `/v1/completions` and `/v1/chat/completions`."""

import abc
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from peftserve.api.http import logprobs as render_logprobs
from peftserve.api.http.body import read_json
from peftserve.api.http.endpoint import Endpoint, request_id_of, services_of, tenant_of
from peftserve.api.http.errors import json_response
from peftserve.api.http.merge import Choice, collect
from peftserve.api.http.openai_schemas import ChatCompletionBody, CompletionBody
from peftserve.api.http.responses import ChatChunk, ChatResponse, CompletionChunk, CompletionResponse
from peftserve.api.http.sse import DONE, event, or_disconnect, stream_deltas
from peftserve.api.request import Delta, Summary, Usage


async def completions(request: Request) -> Response:
    """OpenAI's text completions."""
    body = await read_json(request, CompletionBody)
    return await _answer(request, body, _Completions)


async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions."""
    body = await read_json(request, ChatCompletionBody)
    return await _answer(request, body, _Chat)


class _Format(abc.ABC):
    """How one route writes its answer, whole or streamed."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[Choice], summary: Summary) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.object,
            "choices": [self.choice(choice) for choice in choices],
            "usage": _usage(summary.usage),
        }

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": self.chunk_object, "choices": choices, **more})

    @abc.abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """One choice of a whole answer."""

    @abc.abstractmethod
    def deltas(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The choices that this delta adds to the stream, one per event."""


class _Completions(_Format):
    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, request_id: str, model: str) -> None:
        super().__init__(request_id, model)
        self._offsets: dict[int, int] = {}  # characters sent so far, by index

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": render_logprobs.completion(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def deltas(self, delta: Delta) -> Iterator[dict[str, Any]]:
        offset = self._offsets.get(delta.index, 0)
        begun = sum(render_logprobs.num_characters(entry.chosen.bytes) for entry in delta.logprobs)
        self._offsets[delta.index] = offset + begun
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return
        yield {
            "index": delta.index,
            "text": delta.text,
            "logprobs": render_logprobs.completion(delta.logprobs, offset),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


class _Chat(_Format):
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request_id: str, model: str) -> None:
        super().__init__(request_id, model)
        self._begun: set[int] = set()

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": render_logprobs.chat(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def deltas(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = {"role": "assistant", "content": ""}
            yield {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return
        yield {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or delta.logprobs else {},
            "logprobs": render_logprobs.chat(delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


async def _answer(
    request: Request, body: CompletionBody | ChatCompletionBody, format_: type[_Completions] | type[_Chat]
) -> Response:
    services, request_id = services_of(request), request_id_of(request)
    accepted = body.to_request(id_=request_id, tenant=tenant_of(request), base=services.model_name)
    writer = format_(request_id, body.model)
    deltas = services.generation.generate(accepted)
    if not body.stream:
        choices, summary = await or_disconnect(request, collect(deltas))
        return json_response(writer.whole(choices, summary))

    def render(delta: Delta) -> Iterator[bytes]:
        # With include_usage every event has the field, null but in the last: so OpenAI's reference says.
        nothing = {"usage": None} if body.include_usage else {}
        for choice in writer.deltas(delta):
            yield writer.chunk([choice], **nothing)
        if delta.summary is not None and body.include_usage:
            yield writer.chunk([], usage=_usage(delta.summary.usage))

    return await stream_deltas(request, deltas, render, end=DONE)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/completions",
        completions,
        "OpenAI's text completions",
        "inference",
        body=CompletionBody,
        answers={200: CompletionResponse},
        stream=CompletionChunk,
    ),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "OpenAI's chat completions",
        "inference",
        body=ChatCompletionBody,
        answers={200: ChatResponse},
        stream=ChatChunk,
    ),
)
