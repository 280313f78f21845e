"""The error tree. A leaf. `api.status` maps each class to one HTTP and one gRPC status, and a test holds it to that.

PeftserveError
├── InvalidRequestError            the request itself is wrong; repeating it cannot help
│   ├── PromptTooLongError         prompt + adapter's virtual tokens + max_tokens exceed the context
│   └── InvalidAdapterError        an uploaded adapter has faults (all of them listed)
├── NotFoundError
│   ├── AdapterNotFoundError
│   └── ModelNotFoundError
├── ConflictError                  valid, but not in this state (e.g. deleting a pinned adapter)
├── AuthenticationError            no or unknown API key
├── PermissionDeniedError          known key, not allowed
├── PayloadTooLargeError           a body or an upload over its cap
├── OverloadedError                the queue is full; retry later
├── UnavailableError               not now: starting, restarting, draining
│   ├── EngineDeadError            the engine process died or hung while the request was running
│   └── AdapterLoadError           the adapter could not be brought to the device
├── RequestAbortedError            cancelled by the client or by an operator
├── DeadlineExceededError
├── ConfigurationError             wrong settings, at start-up
│   └── UnsupportedModelError      a checkpoint that the decoder does not implement
└── InternalError                  a bug; the client sees an opaque id
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from peftserve.types import ErrorInfo


class PeftserveError(Exception):
    """Base of all errors that may reach a client.

    `field` names the offending input as the client wrote it (`sampling.top_p`); `faults` lists every fault found
    when there may be several; `retry_after_s` is a hint in seconds when repeating makes sense.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        faults: Sequence[str] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.faults = list(faults)
        self.retry_after_s = retry_after_s

    def to_info(self) -> ErrorInfo:
        """The same error as a value for the wire."""
        return ErrorInfo(
            code=self.code,
            message=self.message,
            field=self.field,
            faults=self.faults,
            retry_after_s=self.retry_after_s,
        )


class InvalidRequestError(PeftserveError):
    code = "invalid_request"


class PromptTooLongError(InvalidRequestError):
    code = "prompt_too_long"


class InvalidAdapterError(InvalidRequestError):
    code = "invalid_adapter"


class NotFoundError(PeftserveError):
    code = "not_found"


class AdapterNotFoundError(NotFoundError):
    code = "adapter_not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class ConflictError(PeftserveError):
    code = "conflict"


class AuthenticationError(PeftserveError):
    code = "unauthenticated"


class PermissionDeniedError(PeftserveError):
    code = "permission_denied"


class PayloadTooLargeError(PeftserveError):
    code = "payload_too_large"


class OverloadedError(PeftserveError):
    code = "overloaded"


class UnavailableError(PeftserveError):
    code = "unavailable"


class EngineDeadError(UnavailableError):
    code = "engine_dead"


class AdapterLoadError(UnavailableError):
    code = "adapter_load_failed"


class RequestAbortedError(PeftserveError):
    code = "aborted"


class DeadlineExceededError(PeftserveError):
    code = "deadline_exceeded"


class ConfigurationError(PeftserveError):
    code = "configuration"


class UnsupportedModelError(ConfigurationError):
    code = "unsupported_model"


class InternalError(PeftserveError):
    code = "internal"


def _tree(cls: type[PeftserveError]) -> Iterator[type[PeftserveError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


ERRORS_BY_CODE: dict[str, type[PeftserveError]] = {
    cls.code: cls for cls in _tree(PeftserveError) if cls is not PeftserveError
}


def from_info(info: ErrorInfo) -> PeftserveError:
    """The error that `info` describes; an unknown code becomes an `InternalError`."""
    cls = ERRORS_BY_CODE.get(info.code, InternalError)
    return cls(info.message, field=info.field, faults=info.faults, retry_after_s=info.retry_after_s)
