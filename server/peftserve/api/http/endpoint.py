"""One route: what the router needs and what the OpenAPI document says about it, in one place."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from peftserve.api.services import Services

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`body` is the JSON body's model; `answers` maps a status to its JSON model, or to a media type.

    `public` routes need no API key.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    body: type[BaseModel] | None = None
    answers: Mapping[int, type[BaseModel] | str] = field(default_factory=dict)
    stream: type[BaseModel] | None = None  # the model of a streamed answer's events, if it can be streamed
    request_body: dict[str, Any] | None = None  # OpenAPI's own words for a body that is not JSON
    public: bool = False


def services_of(request: Request) -> Services:
    """The services behind the app that got this request."""
    return cast(Services, request.app.state.services)


def tenant_of(request: Request) -> str:
    """Set by the middleware from the API key."""
    return str(request.state.tenant)


def request_id_of(request: Request) -> str:
    """The client's `x-request-id`, or one made for it."""
    return str(request.state.request_id)
