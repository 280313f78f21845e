"""The gRPC API without the calls: messages from arguments, values from messages, errors from a call's end."""

import datetime as dt
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import grpc
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2

from peftserve_client.adapter_files import AdapterFiles, ProgressReader
from peftserve_client.errors import (
    ApiError,
    ConnectionFailedError,
    ProtocolError,
    RequestTimeoutError,
    api_error_class,
)
from peftserve_client.request import GenerateOptions, Prompt, native_body
from peftserve_client.types import (
    Adapter,
    AdapterVersion,
    Chunk,
    FinishReason,
    Residency,
    Timings,
    TokenLogprob,
    TokenText,
    Usage,
)
from peftserve_proto.v1 import adapters_pb2, inference_pb2

INFERENCE = "peftserve.v1.Inference"
REQUEST_ID_KEY = "x-request-id"
UPLOAD_CHUNK_BYTES = 2**20
PAGE_SIZE = 1000
_DETAILS_KEY = "grpc-status-details-bin"

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}

# Messages are as large as the server wants them; it bounds what it takes itself. A broken connection is noticed.
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Retries are this package's own, the same over both protocols.
    ("grpc.enable_retries", 0),
]


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Raises `TypeError` for an unknown option and for a value of a wrong type or beyond its field's range."""
    body = native_body(prompt, options)
    request = inference_pb2.GenerateRequest()
    try:
        if "prompt" in body:
            request.prompt = body["prompt"]
        elif "messages" in body:
            request.messages.items.extend(inference_pb2.ChatMessage(**turn) for turn in body["messages"])
        else:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(body["token_ids"])
        if "adapter_id" in body:
            request.adapter_id = body["adapter_id"]
        request.sampling.CopyFrom(inference_pb2.SamplingParams(**body.get("sampling", {})))
    except ValueError as error:
        raise TypeError(str(error)) from None
    return request


def to_chunk(response: inference_pb2.GenerateResponse, request_id: str) -> Chunk:
    summary = response.summary if response.HasField("summary") else None
    stop = response.WhichOneof("stop_reason")
    return Chunk(
        id=request_id,
        index=response.index,
        text=response.text,
        token_ids=list(response.token_ids),
        logprobs=[_position(position) for position in response.logprobs] or None,
        finish_reason=_FINISH_REASONS.get(response.finish_reason),
        stop_reason=None if stop is None else getattr(response, stop),
        usage=None if summary is None else _usage(summary.usage),
        timings=None if summary is None else _timings(summary.timings),
        adapter=None if summary is None or not summary.HasField("adapter") else _version(summary.adapter),
    )


def upload_messages(
    adapter_id: str, files: AdapterFiles, weights: ProgressReader
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """The stream of an upload; the weights are read as they are sent."""
    yield adapters_pb2.UploadAdapterRequest(metadata=adapters_pb2.UploadMetadata(adapter_id=adapter_id))
    for start in range(0, len(files.config), UPLOAD_CHUNK_BYTES):
        yield adapters_pb2.UploadAdapterRequest(config=files.config[start : start + UPLOAD_CHUNK_BYTES])
    for chunk in weights.chunks(UPLOAD_CHUNK_BYTES):
        yield adapters_pb2.UploadAdapterRequest(weights=chunk)


def pin_request(adapter_id: str, pinned: bool) -> adapters_pb2.UpdateAdapterRequest:
    request = adapters_pb2.UpdateAdapterRequest(adapter_id=adapter_id, pinned=pinned)
    request.update_mask.paths.append("pinned")
    return request


def to_adapter(message: adapters_pb2.Adapter) -> Adapter:
    place = message.residency if message.HasField("residency") else None
    return Adapter(
        adapter_id=message.adapter_id,
        kind=message.kind,
        digest=message.digest,
        pinned=message.pinned,
        created_at=message.created_at.ToDatetime(dt.UTC),
        size_bytes=message.size_bytes,
        base_model_name=message.base_model_name,
        details=_whole_numbers(MessageToDict(message.details)),
        residency=None
        if place is None
        else Residency(
            state=place.state,
            refs=place.refs,
            host_bytes=place.host_bytes,
            device_bytes=place.device_bytes,
            load_s=place.load_s if place.HasField("load_s") else None,
            error=place.error if place.HasField("error") else None,
        ),
    )


def request_id_of(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """The request's id in initial metadata; empty when an intermediary dropped it."""
    return str(dict(metadata or ()).get(REQUEST_ID_KEY, ""))


@contextmanager
def call_errors(target: str) -> Iterator[None]:
    """gRPC's errors as this package's."""
    try:
        yield
    except grpc.RpcError as error:
        raise _error(error, target) from error


def _error(error: grpc.RpcError, target: str) -> Exception:
    code, details = error.code(), error.details() or ""
    trailers: dict[str, Any] = dict(cast(Iterable[tuple[str, Any]], error.trailing_metadata() or ()))
    packed = trailers.get(_DETAILS_KEY)
    if isinstance(packed, bytes):
        return _api_error(status_pb2.Status.FromString(packed), code.name)
    # Not from our server: the library's own words.
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return ConnectionFailedError(f"{target}: {details}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return RequestTimeoutError(f"no answer in time from {target}")
        case grpc.StatusCode.UNIMPLEMENTED | grpc.StatusCode.UNKNOWN:
            return ProtocolError(f"{target}: {details or code.name}")
    return api_error_class("", code.name)(details or code.name, status=code.name)


def _api_error(status: status_pb2.Status, code_name: str) -> ApiError:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    code = info.reason.lower()
    has_faults = info.metadata.get("faults", "0") != "0"
    return api_error_class(code, code_name)(
        status.message,
        status=code_name,
        code=code,
        field=info.metadata.get("field"),
        faults=[violation.description for violation in bad.field_violations] if has_faults else [],
        request_id=info.metadata.get("request_id"),
        retry_after_s=retry_after,
    )


def _whole_numbers(value: Any) -> Any:
    """google.protobuf.Struct knows floats only: 4.0 was 4."""
    match value:
        case dict():
            return {key: _whole_numbers(item) for key, item in value.items()}
        case list():
            return [_whole_numbers(item) for item in value]
        case float() if value.is_integer():
            return int(value)
    return value


def _position(position: inference_pb2.TokenLogprob) -> TokenLogprob:
    chosen = position.chosen
    return TokenLogprob(
        chosen.token_id, chosen.text, chosen.logprob, list(chosen.bytes), [_token(token) for token in position.top]
    )


def _token(token: inference_pb2.TokenText) -> TokenText:
    return TokenText(token.token_id, token.text, token.logprob, list(token.bytes))


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def _timings(timings: inference_pb2.Timings) -> Timings:
    return Timings(timings.queued_s, timings.adapter_wait_s, timings.first_token_s, timings.total_s)


def _version(adapter: inference_pb2.AdapterVersion) -> AdapterVersion:
    return AdapterVersion(adapter.name, adapter.kind, adapter.digest)
