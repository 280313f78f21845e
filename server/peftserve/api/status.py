"""The one table from error classes to HTTP and gRPC status. A test holds it to the whole error tree."""

from typing import NamedTuple

import grpc

from peftserve import errors


class Status(NamedTuple):
    """HTTP status, gRPC status and the `type` of OpenAI's error format."""

    http: int
    grpc: grpc.StatusCode
    type: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

STATUS: dict[type[errors.PeftserveError], Status] = {
    errors.InvalidRequestError: Status(400, grpc.StatusCode.INVALID_ARGUMENT, _INVALID),
    errors.PromptTooLongError: Status(400, grpc.StatusCode.INVALID_ARGUMENT, _INVALID),
    errors.InvalidAdapterError: Status(422, grpc.StatusCode.INVALID_ARGUMENT, _INVALID),
    errors.NotFoundError: Status(404, grpc.StatusCode.NOT_FOUND, "not_found_error"),
    errors.AdapterNotFoundError: Status(404, grpc.StatusCode.NOT_FOUND, "not_found_error"),
    errors.ModelNotFoundError: Status(404, grpc.StatusCode.NOT_FOUND, "not_found_error"),
    errors.ConflictError: Status(409, grpc.StatusCode.FAILED_PRECONDITION, "conflict_error"),
    errors.AuthenticationError: Status(401, grpc.StatusCode.UNAUTHENTICATED, "authentication_error"),
    errors.PermissionDeniedError: Status(403, grpc.StatusCode.PERMISSION_DENIED, "permission_error"),
    # Not RESOURCE_EXHAUSTED: clients retry that one, and a body does not shrink by repeating.
    errors.PayloadTooLargeError: Status(413, grpc.StatusCode.INVALID_ARGUMENT, _INVALID),
    errors.OverloadedError: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"),
    errors.UnavailableError: Status(503, grpc.StatusCode.UNAVAILABLE, _SERVER),
    errors.EngineDeadError: Status(503, grpc.StatusCode.UNAVAILABLE, _SERVER),
    errors.AdapterLoadError: Status(503, grpc.StatusCode.UNAVAILABLE, _SERVER),
    errors.RequestAbortedError: Status(499, grpc.StatusCode.CANCELLED, _SERVER),
    errors.DeadlineExceededError: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED, _SERVER),
    errors.ConfigurationError: Status(500, grpc.StatusCode.FAILED_PRECONDITION, _SERVER),
    errors.UnsupportedModelError: Status(500, grpc.StatusCode.FAILED_PRECONDITION, _SERVER),
    errors.InternalError: Status(500, grpc.StatusCode.INTERNAL, _SERVER),
}


def status_of(error: errors.PeftserveError) -> Status:
    """The status of `error`, or of its nearest ancestor in the table; `InternalError`'s if there is none."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return STATUS[errors.InternalError]
