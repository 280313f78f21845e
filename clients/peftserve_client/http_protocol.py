"""The HTTP API without the HTTP: what to send, and what an answer means. Both HTTP clients are thin over this."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from peftserve_client import sse
from peftserve_client.errors import (
    ApiError,
    ClientError,
    ConnectionFailedError,
    ProtocolError,
    RequestTimeoutError,
    api_error_class,
)
from peftserve_client.request import GenerateOptions, Prompt, native_body
from peftserve_client.types import Adapter, Chunk, Model, Result

T = TypeVar("T")

REQUEST_ID_HEADER = "x-request-id"
_ERROR_TEXT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. Header names are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One call: the request, and what its answer means. `parse` gets successful replies only."""

    method: str
    path: str
    parse: Callable[[Reply], T]
    json: Mapping[str, Any] | None = None
    timeout_s: float | None = field(default=None, kw_only=True)


class _ErrorBody(msgspec.Struct):
    message: str
    code: str | None = None
    param: str | None = None
    faults: list[str] = []
    request_id: str | None = None


class _ErrorEnvelope(msgspec.Struct):
    error: _ErrorBody


class _AdapterList(msgspec.Struct):
    data: list[Adapter]


class _ModelList(msgspec.Struct):
    data: list[Model]


def generate(prompt: Prompt, options: GenerateOptions) -> Operation[Result]:
    body = native_body(prompt, options)
    return Operation(
        "POST",
        "/v1/generate",
        lambda reply: decode(reply.body, Result),
        {**body, "stream": False},
        timeout_s=options.get("timeout_s"),
    )


def stream(prompt: Prompt, options: GenerateOptions) -> Operation[None]:
    """The answer is events: see `ChunkDecoder`."""
    body = native_body(prompt, options)
    return Operation(
        "POST", "/v1/generate", lambda reply: None, {**body, "stream": True}, timeout_s=options.get("timeout_s")
    )


def models() -> Operation[list[Model]]:
    return Operation("GET", "/v1/models", lambda reply: decode(reply.body, _ModelList).data)


def probe(path: str) -> Operation[bool]:
    """`/livez` or `/readyz`."""
    return Operation("GET", path, lambda reply: True)


def adapter_path(adapter_id: str) -> str:
    return f"/v1/adapters/{quote(adapter_id, safe='')}"


def list_adapters() -> Operation[list[Adapter]]:
    return Operation("GET", "/v1/adapters", lambda reply: decode(reply.body, _AdapterList).data)


def get_adapter(adapter_id: str) -> Operation[Adapter]:
    return Operation("GET", adapter_path(adapter_id), to_adapter)


def push_adapter(adapter_id: str) -> Operation[Adapter]:
    return Operation("PUT", adapter_path(adapter_id), to_adapter)


def delete_adapter(adapter_id: str) -> Operation[None]:
    return Operation("DELETE", adapter_path(adapter_id), lambda reply: None)


def pin_adapter(adapter_id: str, pinned: bool) -> Operation[Adapter]:
    return Operation("PATCH", adapter_path(adapter_id), to_adapter, {"pinned": pinned})


def to_adapter(reply: Reply) -> Adapter:
    return decode(reply.body, Adapter)


def decode(body: bytes, kind: type[T]) -> T:
    """`body` as JSON of a `kind`; unknown fields are ignored, so that newer servers work. Raises `ProtocolError`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"unexpected answer: {error}") from None


def check(reply: Reply) -> Reply:
    """`reply` itself if it is a success; else raises the `ApiError` that it describes."""
    if 200 <= reply.status < 300:
        return reply
    retry_after = _seconds(reply.headers.get("retry-after"))
    request_id = reply.headers.get(REQUEST_ID_HEADER)
    try:
        error = msgspec.json.decode(reply.body, type=_ErrorEnvelope).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = " ".join(reply.body[:_ERROR_TEXT_CHARS].decode("utf-8", "replace").split())
        error = _ErrorBody(f"HTTP {reply.status}" + (f": {text}" if text else ""))
    raise _api_error(error, reply.status, request_id, retry_after)


class ChunkDecoder:
    """Bytes of an event stream in, chunks out. Raises an `ApiError` where the server reports one."""

    def __init__(self, status: int) -> None:
        self._events = sse.Decoder()
        self._status = status
        self._complete = False

    def feed(self, data: bytes) -> Iterator[Chunk]:
        for event in self._events.feed(data):
            if event.data.startswith(b'{"error"'):
                raise _api_error(decode(event.data, _ErrorEnvelope).error, self._status, None, None)
            chunk = decode(event.data, Chunk)
            self._complete = chunk.usage is not None
            yield chunk

    def end(self) -> None:
        """Call at the end of the bytes; raises `ConnectionFailedError` when the last chunk never came."""
        if not self._complete:
            raise ConnectionFailedError("the stream ended before the answer was complete")


@contextmanager
def transport_errors() -> Iterator[None]:
    """httpx's errors as this package's."""
    try:
        yield
    except httpx.ConnectTimeout as error:  # aiohttp's transport also says so of a server that hung up
        raise ConnectionFailedError(f"no connection to {_target(error)}: {error or 'timed out'}") from error
    except httpx.TimeoutException as error:
        raise RequestTimeoutError(f"no answer in time from {_target(error)}") from error
    except httpx.TransportError as error:
        raise ConnectionFailedError(f"{_target(error)}: {error or type(error).__name__}") from error
    except httpx.InvalidURL as error:
        raise ClientError(f"bad URL: {error}") from error
    except httpx.HTTPError as error:
        raise ProtocolError(f"unexpected answer: {error}") from error


def _api_error(error: _ErrorBody, status: int, request_id: str | None, retry_after: float | None) -> ApiError:
    cls = api_error_class(error.code or "", status)
    return cls(
        error.message,
        status=status,
        code=error.code or "",
        field=error.param,
        faults=error.faults,
        request_id=error.request_id or request_id,
        retry_after_s=retry_after,
    )


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds. Its other form, a date, is not worth trusting two clocks for."""
    return float(header) if header and header.isdecimal() else None


def _target(error: httpx.HTTPError) -> str:
    try:
        url = error.request.url
    except RuntimeError:
        return "the server"
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
