"""Request bodies, with the size cap enforced while reading."""

from collections.abc import AsyncIterator

from pydantic import BaseModel
from starlette.requests import Request

from peftserve.api.http.endpoint import services_of
from peftserve.api.parse import parse_body
from peftserve.api.schemas import BodyT
from peftserve.errors import InvalidRequestError, PayloadTooLargeError, RequestAbortedError


async def read_json(request: Request, model: type[BodyT]) -> BodyT:
    """The JSON body as a `model`. Raises `PayloadTooLargeError`, `InvalidRequestError`."""
    limit = services_of(request).config.limits.max_body_bytes
    raw = bytearray()
    async for chunk in stream_body(request, limit, "the body"):
        raw += chunk
    if not raw:
        raise InvalidRequestError(f"the body is empty; a JSON object is needed ({_fields(model)})")
    return parse_body(model, bytes(raw))


async def stream_body(request: Request, limit: int, what: str) -> AsyncIterator[bytes]:
    """The body's chunks, up to `limit` bytes; a declared length over it is refused before anything is read."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise PayloadTooLargeError(f"{what} has {declared} bytes, and the limit is {limit}")
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise RequestAbortedError("the client went away")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise PayloadTooLargeError(f"{what} has more than {limit} bytes, which is the limit")
        if chunk:
            yield chunk
        if not message.get("more_body", False):
            return


def _fields(model: type[BaseModel]) -> str:
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    return "required: " + ", ".join(required) if required else "fields: " + ", ".join(list(model.model_fields)[:3])
