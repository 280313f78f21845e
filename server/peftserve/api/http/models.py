"""`/v1/models`: the base model, and each adapter as a model whose parent is the base."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from peftserve.adapters.manifest import AdapterRecord
from peftserve.api.http import responses
from peftserve.api.http.endpoint import Endpoint, services_of, tenant_of
from peftserve.api.http.errors import json_response
from peftserve.api.services import Services
from peftserve.errors import AdapterNotFoundError, ModelNotFoundError

OWNER = "peftserve"


async def list_models(request: Request) -> Response:
    """Every name that `model` may have."""
    services = services_of(request)
    views = await services.adapters.list(tenant_of(request))
    models = [_base(services), *(_adapter(services, view.record) for view in views)]
    return json_response({"object": "list", "data": models})


async def get_model(request: Request) -> Response:
    """One of them."""
    services, name = services_of(request), str(request.path_params["model_id"])
    if name == services.model_name:
        return json_response(_base(services))
    try:
        record = await services.adapters.resolve(tenant_of(request), name, field="model")
    except AdapterNotFoundError as error:
        raise ModelNotFoundError(error.message, field="model") from error
    return json_response(_adapter(services, record))


def _base(services: Services) -> dict[str, Any]:
    return _model(services, services.model_name, services.started_at, None)


def _adapter(services: Services, record: AdapterRecord) -> dict[str, Any]:
    return _model(services, record.name, record.created_at, services.model_name)


def _model(services: Services, name: str, created: float, parent: str | None) -> dict[str, Any]:
    info = services.engine.info
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": OWNER,
        "parent": parent,
        "root": name,
        "max_model_len": None if info is None else info.max_model_len,
    }


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/models",
        list_models,
        "The base model and the adapters",
        "models",
        answers={200: responses.ModelList},
    ),
    Endpoint("GET", "/v1/models/{model_id:path}", get_model, "One model", "models", answers={200: responses.Model}),
)
