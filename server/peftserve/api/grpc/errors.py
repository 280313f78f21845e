"""A `PeftserveError` as google.rpc.Status: https://google.aip.dev/193 (ErrorInfo, BadRequest, RetryInfo)."""

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from peftserve.api.status import status_of
from peftserve.errors import PeftserveError

DOMAIN = "peftserve"

# Details travel in HTTP/2 trailers, of which gRPC clients accept 8 KiB by default, and the message is sent twice.
_MESSAGE_CHARS = 1024
_FAULTS_CHARS = 2048


def to_status(error: PeftserveError, request_id: str) -> grpc.Status:
    """`error` with its code, field, faults and retry hint as details.

    ErrorInfo: `reason` is the code in capitals; `metadata` has `request_id`, `field` if there is one, and `faults`,
    their number, which may be more than were sent. BadRequest: one violation per fault; a fault about one field begins
    with its name and a colon.
    """
    faults = _fitting(error.faults)
    metadata = {"request_id": request_id, "faults": str(len(error.faults))}
    if error.field:
        metadata["field"] = error.field
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=DOMAIN, metadata=metadata)]
    if error.field or faults:
        details.append(_bad_request(error.field, faults or [error.message]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(
        code=status_of(error).grpc.value[0], message=_cut(error.message, _MESSAGE_CHARS), details=map(_packed, details)
    )
    return rpc_status.to_status(status)


def _bad_request(field: str | None, faults: Sequence[str]) -> error_details_pb2.BadRequest:
    violations = []
    for position, fault in enumerate(faults):
        name, colon, _ = fault.partition(": ")
        is_field = bool(colon) and name.replace(".", "").replace("_", "").isalnum()
        where = name if is_field else (field or "") if position == 0 else ""
        violations.append(error_details_pb2.BadRequest.FieldViolation(field=where, description=fault))
    return error_details_pb2.BadRequest(field_violations=violations)


def _fitting(faults: Sequence[str]) -> list[str]:
    room = _FAULTS_CHARS
    kept: list[str] = []
    for fault in faults:
        room -= len(fault) + 32
        if room < 0 and kept:
            break
        kept.append(_cut(fault, _FAULTS_CHARS // 2))
    return kept


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
