"""The HTTP door as an ASGI application: a table of endpoints, one middleware, one shape of errors."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from peftserve.api.http import adapters, models, native, openai, openapi, ops, server_files
from peftserve.api.http.dashboard import routes as dashboard
from peftserve.api.http.endpoint import Endpoint
from peftserve.api.http.errors import json_response, on_peftserve_error, on_routing_error
from peftserve.api.http.middleware import Gate
from peftserve.api.services import Services
from peftserve.errors import PeftserveError

ENDPOINTS: tuple[Endpoint, ...] = (
    *native.ENDPOINTS,
    *openai.ENDPOINTS,
    *models.ENDPOINTS,
    *adapters.ENDPOINTS,
    *server_files.ENDPOINTS,
    *ops.ENDPOINTS,
    *dashboard.ENDPOINTS,
)


def build_app(services: Services) -> Starlette:
    """The application over `services`."""
    document = openapi.document(ENDPOINTS)

    async def openapi_json(request: Request) -> Response:
        return json_response(document)

    routes = [Route(endpoint.path, endpoint.handler, methods=[endpoint.method]) for endpoint in ENDPOINTS]
    routes.append(Route("/openapi.json", openapi_json, methods=["GET"]))
    public = [endpoint.path for endpoint in ENDPOINTS if endpoint.public]
    app = Starlette(
        routes=routes,
        # As Starlette's middleware, not around it: its own handler of bugs, outermost, would answer before the gate.
        middleware=[Middleware(Gate, auth=services.auth, metrics=services.metrics, public=public)],
        exception_handlers={PeftserveError: on_peftserve_error, HTTPException: on_routing_error},
    )
    app.state.services = services
    return app
