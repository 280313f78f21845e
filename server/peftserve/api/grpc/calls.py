"""What every call needs: an id, a tenant, and errors turned into a status."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from peftserve.api.auth import Authenticator
from peftserve.api.grpc.errors import to_status
from peftserve.errors import InternalError, PeftserveError
from peftserve.log import get_logger
from peftserve.metrics import Metrics

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_DISCARD_BYTES = 64 * 2**20
_DISCARD_S = 5.0

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated call. `timeout_s` is what is left of the client's deadline, None without one."""

    id: str
    tenant: str
    timeout_s: float | None


class Calls:
    """Begins calls: `async with calls.begin(context, method) as call: ...`."""

    def __init__(self, authenticator: Authenticator, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics

    @asynccontextmanager
    async def begin(
        self, context: grpc.aio.ServicerContext[Any, Any], method: str, unread: AsyncIterator[Message] | None = None
    ) -> AsyncIterator[Call]:
        """Sends the call's id as initial metadata, checks the API key, and ends the call with a status on any error.

        The id is the client's own `x-request-id` or a new one. An error that is a bug (no `PeftserveError`, or an
        `InternalError`) is logged under it, and the client sees only the id. `unread` is the request stream of a
        client-streaming call, of which a good part is still read before an error is sent: grpc.aio clients lose the
        status when a write of theirs fails first.
        """
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        given = metadata.get(REQUEST_ID_KEY, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
        outcome = grpc.StatusCode.CANCELLED  # unless we come to an end of our own
        try:
            yield Call(request_id, self._authenticator.tenant(metadata.get("authorization")), context.time_remaining())
            outcome = grpc.StatusCode.OK
        except grpc.aio.BaseError:  # the connection is gone: nobody is left to tell
            raise
        except Exception as error:
            status = to_status(_presentable(error, request_id), request_id)
            outcome = status.code
            if unread is not None:
                await _discard(unread)
            await context.abort(status.code, status.details, status.trailing_metadata)
        finally:
            self._metrics.grpc_answered(method, outcome.name)


async def _discard(messages: AsyncIterator[Message]) -> None:
    left = _DISCARD_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            async for message in messages:
                left -= message.ByteSize()
                if left < 0:
                    return


def _presentable(error: Exception, request_id: str) -> PeftserveError:
    if isinstance(error, PeftserveError) and not isinstance(error, InternalError):
        return error
    _log.error("internal error", request_id=request_id, exc_info=error)
    return InternalError(f"internal error; the server's log has it under request id {request_id}")
