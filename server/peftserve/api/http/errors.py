"""Errors as HTTP answers, all of one shape: OpenAI's, with `faults` and `request_id` beside."""

import math
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from peftserve.api.http.endpoint import request_id_of
from peftserve.api.status import status_of
from peftserve.errors import InternalError, PeftserveError
from peftserve.log import get_logger

log = get_logger(__name__)

_ROUTING = {404: "route_not_found", 405: "method_not_allowed"}


def error_body(error: PeftserveError, request_id: str) -> dict[str, Any]:
    """The JSON that describes `error`."""
    return _body(
        message=error.message,
        type_=status_of(error).type,
        param=error.field,
        code=error.code,
        faults=error.faults,
        request_id=request_id,
    )


def error_response(error: PeftserveError, request_id: str) -> Response:
    """The answer for `error`, with `Retry-After` and `WWW-Authenticate` where they belong."""
    status = status_of(error).http
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error, request_id), status=status, headers=headers)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, headers=headers, media_type="application/json")


def opaque(error: Exception, request_id: str) -> PeftserveError:
    """`error` itself if clients may see it; else log it and return one that says nothing but where to look."""
    if isinstance(error, PeftserveError) and not isinstance(error, InternalError):
        return error
    log.error("internal error", request_id=request_id, exc_info=error)
    return InternalError(f"internal error; the server's log has it under request id {request_id}")


async def on_peftserve_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for the error tree."""
    request_id = request_id_of(request)
    return error_response(opaque(error, request_id), request_id)


async def on_routing_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for what its router raises: 404 and 405."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    text = "no such route" if status == 404 else "no such method here"
    body = _body(
        message=f"{text}: {request.method} {request.url.path}",
        type_="invalid_request_error",
        param=None,
        code=_ROUTING.get(status, "http_error"),
        faults=[],
        request_id=request_id_of(request),
    )
    return json_response(body, status=status, headers=headers)


def _body(
    *, message: str, type_: str, param: str | None, code: str, faults: list[str], request_id: str
) -> dict[str, Any]:
    return {
        "error": {
            "message": message,
            "type": type_,
            "param": param,
            "code": code,
            "faults": faults,
            "request_id": request_id,
        }
    }
