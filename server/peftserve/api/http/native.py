"""`POST /v1/generate`: the native route, with tokens, timings and the adapter version that served it."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from peftserve.api.http.body import read_json
from peftserve.api.http.endpoint import Endpoint, request_id_of, services_of, tenant_of
from peftserve.api.http.errors import json_response
from peftserve.api.http.merge import Choice, collect
from peftserve.api.http.responses import GenerateChunk, GenerateResponse
from peftserve.api.http.sse import event, or_disconnect, stream_deltas
from peftserve.api.request import Delta, GenerateRequest, Summary, TokenLogprob, TokenText
from peftserve.api.schemas import GenerateBody


async def generate(request: Request) -> Response:
    """Text for a prompt: whole, or as events, the last of which has `usage`, `timings` and `adapter`."""
    body = await read_json(request, GenerateBody)
    services, request_id = services_of(request), request_id_of(request)
    accepted = GenerateRequest.from_body(body, request_id=request_id, tenant=tenant_of(request))
    deltas = services.generation.generate(accepted)
    if body.stream:

        def render(delta: Delta) -> list[bytes]:
            end = {} if delta.summary is None else {"model": services.model_name, **_summary(delta.summary)}
            return [event({"id": request_id, **_choice(delta), **end})]

        return await stream_deltas(request, deltas, render)
    choices, summary = await or_disconnect(request, collect(deltas))
    head = {"id": request_id, "model": services.model_name}
    return json_response({**head, "choices": [_choice(choice) for choice in choices], **_summary(summary)})


def _choice(part: Delta | Choice) -> dict[str, Any]:
    return {
        "index": part.index,
        "text": part.text,
        "token_ids": part.token_ids,
        "logprobs": _logprobs(part.logprobs),
        "finish_reason": part.finish_reason,
        "stop_reason": part.stop_reason,
    }


def _logprobs(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]] | None:
    if not entries:
        return None
    return [{**_token(entry.chosen), "top": [_token(token) for token in entry.top]} for entry in entries]


def _token(token: TokenText) -> dict[str, Any]:
    return {"token_id": token.token_id, "token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}


def _summary(summary: Summary) -> dict[str, Any]:
    adapter, usage = summary.adapter, summary.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "timings": summary.timings,
        "adapter": adapter and {"name": adapter.name, "kind": adapter.kind, "digest": adapter.digest},
    }


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/generate",
        generate,
        "Generate text with an adapter, or with the bare base model",
        "inference",
        body=GenerateBody,
        answers={200: GenerateResponse},
        stream=GenerateChunk,
    ),
)
