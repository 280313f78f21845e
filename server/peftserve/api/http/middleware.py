"""What every HTTP request passes through: an id, the API key, the last net for errors, one count."""

import re
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftserve.api.auth import Authenticator
from peftserve.api.http.errors import error_response, opaque
from peftserve.errors import AuthenticationError
from peftserve.metrics import Metrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware. Sets `state.request_id` and `state.tenant`; every answer carries `x-request-id`."""

    def __init__(self, app: ASGIApp, *, auth: Authenticator, metrics: Metrics, public: Collection[str]) -> None:
        self._app = app
        self._auth = auth
        self._metrics = metrics
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0  # until the answer has begun

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if scope["path"] not in self._public:
                scope["state"]["tenant"] = self._auth.tenant(headers.get("authorization"))
            await self._app(scope, receive, send_tagged)
        except AuthenticationError as error:
            await error_response(error, request_id)(scope, receive, send_tagged)
        except Exception as error:
            if status:
                raise  # half an answer is out: only closing the connection tells the client
            await error_response(opaque(error, request_id), request_id)(scope, receive, send_tagged)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "unknown"
            self._metrics.http_answered(scope["method"], path, status, time.monotonic() - began)
