"""Routes for operators and probes, and the tokenizer's."""

import anyio.to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from peftserve import __version__
from peftserve.api.http import responses
from peftserve.api.http.body import read_json
from peftserve.api.http.endpoint import Endpoint, services_of
from peftserve.api.http.errors import json_response
from peftserve.api.limits import check_token_ids
from peftserve.api.schemas import DetokenizeBody, TokenizeBody
from peftserve.types import AdapterKind


async def livez(request: Request) -> Response:
    """200 while the process answers: restart it when it does not."""
    return json_response({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 while requests are accepted, else 503: send traffic elsewhere."""
    services = services_of(request)
    if services.generation.ready:
        return json_response({"status": "ready"})
    state = "draining" if services.generation.draining else str(services.engine.state)
    return json_response({"status": state}, status=503)


async def metrics(request: Request) -> Response:
    """Prometheus' text format. With API keys it needs one, as adapter names are in it."""
    return Response(services_of(request).metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})


async def version(request: Request) -> Response:
    """The server's version and its base model."""
    kinds = [kind for kind in AdapterKind if kind is not AdapterKind.BASE]
    return json_response({"version": __version__, "model": services_of(request).model_name, "kinds": kinds})


async def tokenize(request: Request) -> Response:
    """Tokens of a text or of a conversation."""
    body = await read_json(request, TokenizeBody)
    services = services_of(request)
    tokenizer, info = services.tokenizer, services.engine.info

    def work() -> Response:
        if body.messages is not None:
            tokens = tokenizer.apply_chat_template([message.for_template() for message in body.messages])
        else:
            tokens = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": 0 if info is None else info.max_model_len,
                "tokens": tokens,
                "token_strs": [tokenizer.token(token) for token in tokens] if body.return_token_strs else None,
            }
        )

    size = len(body.prompt or "") + sum(message.size for message in body.messages or ())
    return await services.generation.encodings.run(size, work)


async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    body = await read_json(request, DetokenizeBody)
    services = services_of(request)
    tokens = check_token_ids(body.tokens, services.spec.vocab_size, "tokens") if body.tokens else []
    skip = body.skip_special_tokens
    text = await anyio.to_thread.run_sync(lambda: services.tokenizer.decode(tokens, skip_special_tokens=skip))
    return json_response({"prompt": text})


_PROBE = {200: responses.Health, 503: responses.Health}
ENDPOINTS = (
    Endpoint("GET", "/livez", livez, "Whether the process lives", "ops", answers={200: responses.Health}, public=True),
    Endpoint("GET", "/readyz", readyz, "Whether requests are accepted", "ops", answers=_PROBE, public=True),
    Endpoint("GET", "/health", readyz, "The same as /readyz", "ops", answers=_PROBE, public=True),
    Endpoint("GET", "/metrics", metrics, "Prometheus metrics", "ops", answers={200: "text/plain"}),
    Endpoint("GET", "/version", version, "Version and base model", "ops", answers={200: responses.Version}),
    Endpoint(
        "POST",
        "/tokenize",
        tokenize,
        "Text to tokens",
        "tokenizer",
        body=TokenizeBody,
        answers={200: responses.Tokens},
    ),
    Endpoint(
        "POST",
        "/detokenize",
        detokenize,
        "Tokens to text",
        "tokenizer",
        body=DetokenizeBody,
        answers={200: responses.Text},
    ),
)
