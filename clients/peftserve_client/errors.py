"""What can go wrong, the same over HTTP and gRPC.

ClientError
├── ConnectionFailedError          no answer: refused, reset, gone in mid-answer
├── RequestTimeoutError            no answer in time
├── ProtocolError                  an answer that no peftserve gives (a proxy's page, a cut stream)
├── AdapterFilesError              the files to push cannot be read
└── ApiError                       the server's answer is an error
    ├── InvalidRequestError        PromptTooLongError, InvalidAdapterError
    ├── NotFoundError              AdapterNotFoundError, ModelNotFoundError
    ├── ConflictError
    ├── AuthenticationError
    ├── PermissionDeniedError
    ├── PayloadTooLargeError
    ├── OverloadedError            retried
    ├── UnavailableError           retried; EngineDeadError, AdapterLoadError
    ├── RequestAbortedError
    ├── DeadlineExceededError
    └── InternalServerError
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar


class ClientError(Exception):
    """Base of everything that this package raises on purpose."""


class ConnectionFailedError(ClientError):
    """The server could not be reached, or the connection broke before the answer was complete."""


class RequestTimeoutError(ClientError):
    """The client's own time limit passed first."""


class ProtocolError(ClientError):
    """The answer is not what a peftserve server sends."""


class AdapterFilesError(ClientError):
    """The adapter's files are missing or ambiguous on this side."""


class ApiError(ClientError):
    """An error that the server answered.

    `status` is the HTTP status (404) or the name of the gRPC one ("NOT_FOUND"); `code` the server's own name of the
    error, equal on both; `field` the offending input (`sampling.top_p`); `faults` every fault found when there may be
    several; `request_id` finds the request in the server's log; `retry_after_s` a hint in seconds.
    """

    default_code: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        status: int | str,
        code: str = "",
        field: str | None = None,
        faults: Sequence[str] = (),
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code or self.default_code
        self.field = field
        self.faults = list(faults)
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidRequestError(ApiError):
    default_code = "invalid_request"


class PromptTooLongError(InvalidRequestError):
    default_code = "prompt_too_long"


class InvalidAdapterError(InvalidRequestError):
    default_code = "invalid_adapter"


class NotFoundError(ApiError):
    default_code = "not_found"


class AdapterNotFoundError(NotFoundError):
    default_code = "adapter_not_found"


class ModelNotFoundError(NotFoundError):
    default_code = "model_not_found"


class ConflictError(ApiError):
    default_code = "conflict"


class AuthenticationError(ApiError):
    default_code = "unauthenticated"


class PermissionDeniedError(ApiError):
    default_code = "permission_denied"


class PayloadTooLargeError(ApiError):
    default_code = "payload_too_large"


class OverloadedError(ApiError):
    default_code = "overloaded"


class UnavailableError(ApiError):
    default_code = "unavailable"


class EngineDeadError(UnavailableError):
    default_code = "engine_dead"


class AdapterLoadError(UnavailableError):
    default_code = "adapter_load_failed"


class RequestAbortedError(ApiError):
    default_code = "aborted"


class DeadlineExceededError(ApiError):
    default_code = "deadline_exceeded"


class InternalServerError(ApiError):
    default_code = "internal"


def _tree(cls: type[ApiError]) -> Iterator[type[ApiError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


_BY_CODE = {cls.default_code: cls for cls in _tree(ApiError) if cls.default_code}

# For answers without a code of ours: a proxy's, or the transport's own.
_BY_STATUS: dict[int | str, type[ApiError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    422: InvalidRequestError,
    429: OverloadedError,
    500: InternalServerError,
    503: UnavailableError,
    504: DeadlineExceededError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "NOT_FOUND": NotFoundError,
    "FAILED_PRECONDITION": ConflictError,
    # The gRPC library's own, for a message over the limit; our server's "overloaded" brings its code.
    "RESOURCE_EXHAUSTED": PayloadTooLargeError,
    "CANCELLED": RequestAbortedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "INTERNAL": InternalServerError,
}


def api_error_class(code: str, status: int | str) -> type[ApiError]:
    """The class for the server's `code`; for one that this version does not know, the class of `status`."""
    return _BY_CODE.get(code) or _BY_STATUS.get(status, ApiError)
