"""Errors as google.rpc.Status: every class, all details, never too large for a trailer."""

from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2

from peftserve.api.grpc.errors import to_status
from peftserve.api.status import status_of
from peftserve.errors import ERRORS_BY_CODE, InvalidAdapterError, OverloadedError, PeftserveError


def unpack(error: PeftserveError) -> tuple[status_pb2.Status, dict[str, Any]]:
    grpc_status = to_status(error, "r1")
    [(key, value)] = grpc_status.trailing_metadata
    assert key == "grpc-status-details-bin"
    assert isinstance(value, bytes)
    status = status_pb2.Status.FromString(value)
    assert status.message == grpc_status.details
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return status, found


@pytest.mark.parametrize("code", sorted(ERRORS_BY_CODE))
def test_every_class_keeps_its_code_and_status(code: str) -> None:
    error = ERRORS_BY_CODE[code]("what happened")
    status, details = unpack(error)
    assert status.code == status_of(error).grpc.value[0]
    assert status.message == "what happened"
    assert details["ErrorInfo"].reason == code.upper()
    assert dict(details["ErrorInfo"].metadata) == {"request_id": "r1", "faults": "0"}


def test_retry_after_keeps_its_fraction() -> None:
    _, details = unpack(OverloadedError("full", retry_after_s=1.5))
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1500


def test_faults_name_their_fields() -> None:
    _, details = unpack(InvalidAdapterError("two faults", field="config", faults=["r: must be above 0", "no weights"]))
    violations = [(violation.field, violation.description) for violation in details["BadRequest"].field_violations]
    assert violations == [("r", "r: must be above 0"), ("", "no weights")]
    assert details["ErrorInfo"].metadata["field"] == "config"


def test_ten_thousand_faults_fit_into_a_trailer() -> None:
    faults = [f"tensor model.layers.{i}.weight: unexpected" for i in range(10_000)]
    error = InvalidAdapterError("adapter refused: " + "; ".join(faults), faults=faults)
    _, details = unpack(error)
    status = to_status(error, "r1")
    [(_, value)] = status.trailing_metadata
    # base64 and percent-encoding make more of it on the wire; clients take 8 KiB of trailers by default.
    assert len(value) * 4 / 3 + 3 * len(status.details) < 8192
    assert details["ErrorInfo"].metadata["faults"] == "10000"
    assert len(details["BadRequest"].field_violations) > 10
