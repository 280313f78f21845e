"""`/v1/adapters`: upload, list, show, pin, delete."""

from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from peftserve.api.adapter_service import AdapterView
from peftserve.api.http import responses
from peftserve.api.http.body import read_json, stream_body
from peftserve.api.http.endpoint import Endpoint, services_of, tenant_of
from peftserve.api.http.errors import json_response
from peftserve.api.http.multipart import AdapterForm
from peftserve.api.schemas import PatchAdapterBody

_FORM_OVERHEAD = 64 * 1024  # boundaries and part headers, generously
_UPLOAD_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
                    "weights": {"type": "string", "format": "binary", "description": "adapter_model.safetensors"},
                },
                "required": ["config", "weights"],
                "additionalProperties": False,
            }
        }
    },
}


async def put_adapter(request: Request) -> Response:
    """Store an adapter, or a new version of it; the same again changes nothing."""
    services, tenant, name = services_of(request), tenant_of(request), _adapter_id(request)
    limit = services.config.limits.max_adapter_bytes + _FORM_OVERHEAD
    async with services.adapters.upload(tenant, name) as upload:
        form = AdapterForm(request.headers.get("content-type", ""), upload)
        async for chunk in stream_body(request, limit, "the upload"):
            await anyio.to_thread.run_sync(form.feed, chunk)
        form.finish()
        return _answer(await services.adapters.commit(tenant, name, upload))


async def list_adapters(request: Request) -> Response:
    """The tenant's adapters, by name."""
    views = await services_of(request).adapters.list(tenant_of(request))
    return json_response({"object": "list", "data": [adapter_body(view) for view in views]})


async def get_adapter(request: Request) -> Response:
    """One adapter's current version, and where the engine has it."""
    return _answer(await services_of(request).adapters.get(tenant_of(request), _adapter_id(request)))


async def patch_adapter(request: Request) -> Response:
    """Pin it to the device, or unpin it."""
    body = await read_json(request, PatchAdapterBody)
    services = services_of(request)
    return _answer(await services.adapters.set_pinned(tenant_of(request), _adapter_id(request), body.pinned))


async def delete_adapter(request: Request) -> Response:
    """Remove the name and its versions; requests that run on it end normally."""
    await services_of(request).adapters.delete(tenant_of(request), _adapter_id(request))
    return Response(status_code=204)


def adapter_body(view: AdapterView) -> dict[str, Any]:
    """The adapter as JSON."""
    record, place = view.record, view.residency
    return {
        "adapter_id": record.name,
        "object": "adapter",
        "kind": record.kind,
        "digest": record.digest,
        "pinned": record.pinned,
        "created_at": datetime.fromtimestamp(record.created_at, UTC),
        "size_bytes": record.size_bytes,
        "base_model_name": record.base_model_name or "",
        "details": record.details,
        "residency": place
        and {
            "state": place.state,
            "refs": place.refs,
            "host_bytes": place.host_bytes,
            "device_bytes": place.device_bytes,
            "load_s": place.load_s,
            "error": place.error,
        },
    }


def _answer(view: AdapterView) -> Response:
    return json_response(adapter_body(view), headers={"etag": f'"{view.record.digest}"'})


def _adapter_id(request: Request) -> str:
    return str(request.path_params["adapter_id"])


_ONE = {200: responses.AdapterAnswer}
ENDPOINTS = (
    Endpoint(
        "PUT",
        "/v1/adapters/{adapter_id}",
        put_adapter,
        "Upload an adapter or a new version of it",
        "adapters",
        answers=_ONE,
        request_body=_UPLOAD_FORM,
    ),
    Endpoint("GET", "/v1/adapters", list_adapters, "List adapters", "adapters", answers={200: responses.AdapterList}),
    Endpoint("GET", "/v1/adapters/{adapter_id}", get_adapter, "Show an adapter", "adapters", answers=_ONE),
    Endpoint(
        "PATCH",
        "/v1/adapters/{adapter_id}",
        patch_adapter,
        "Pin or unpin an adapter",
        "adapters",
        body=PatchAdapterBody,
        answers=_ONE,
    ),
    Endpoint("DELETE", "/v1/adapters/{adapter_id}", delete_adapter, "Delete an adapter", "adapters", answers={204: ""}),
)
