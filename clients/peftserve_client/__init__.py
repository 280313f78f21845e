"""Clients of a peftserve server: blocking and asyncio, over HTTP and gRPC, with the same methods, results and errors.

    from peftserve_client import Client

    with Client("http://127.0.0.1:8000") as client:
        client.adapters.push("my-adapter", "path/to/adapter")
        print(client.chat("Hello!", adapter_id="my-adapter", max_tokens=32).text)

`Client`, `AsyncClient` (HTTP), `GrpcClient`, `AsyncGrpcClient`: generate, stream, chat, health, ready, and
adapters.push / list / get / delete / pin. This package never imports the server.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peftserve_client.errors import (
    AdapterFilesError,
    AdapterLoadError,
    AdapterNotFoundError,
    ApiError,
    AuthenticationError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    DeadlineExceededError,
    EngineDeadError,
    InternalServerError,
    InvalidAdapterError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    PromptTooLongError,
    ProtocolError,
    RequestAbortedError,
    RequestTimeoutError,
    UnavailableError,
)
from peftserve_client.request import GenerateOptions, Message, Prompt
from peftserve_client.retry import RetryPolicy
from peftserve_client.types import (
    Adapter,
    AdapterVersion,
    Choice,
    Chunk,
    Model,
    Residency,
    Result,
    Timings,
    TokenLogprob,
    TokenText,
    Usage,
)

if TYPE_CHECKING:
    from peftserve_client.grpc_async import AsyncGrpcClient
    from peftserve_client.grpc_sync import GrpcClient
    from peftserve_client.http_async import AsyncClient
    from peftserve_client.http_sync import Client

# Imported when first asked for: who speaks HTTP should not wait for gRPC to load, nor the other way round.
_CLIENTS = {
    "AsyncClient": "peftserve_client.http_async",
    "AsyncGrpcClient": "peftserve_client.grpc_async",
    "Client": "peftserve_client.http_sync",
    "GrpcClient": "peftserve_client.grpc_sync",
}

__all__ = [
    "Adapter",
    "AdapterFilesError",
    "AdapterLoadError",
    "AdapterNotFoundError",
    "AdapterVersion",
    "ApiError",
    "AsyncClient",
    "AsyncGrpcClient",
    "AuthenticationError",
    "Choice",
    "Chunk",
    "Client",
    "ClientError",
    "ConflictError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "EngineDeadError",
    "GenerateOptions",
    "GrpcClient",
    "InternalServerError",
    "InvalidAdapterError",
    "InvalidRequestError",
    "Message",
    "Model",
    "ModelNotFoundError",
    "NotFoundError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Prompt",
    "PromptTooLongError",
    "ProtocolError",
    "RequestAbortedError",
    "RequestTimeoutError",
    "Residency",
    "Result",
    "RetryPolicy",
    "Timings",
    "TokenLogprob",
    "TokenText",
    "UnavailableError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _CLIENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_CLIENTS[name]), name)
