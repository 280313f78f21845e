"""The OpenAPI 3.1 document, from the same table as the routes and the same models as validation."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from peftserve import __version__
from peftserve.api.http.endpoint import Endpoint
from peftserve.api.http.responses import ErrorAnswer

_REF = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document as JSON values."""
    schemas = _schemas(endpoints)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "peftserve",
            "version": __version__,
            "description": "One 4-bit base model; LoRA, prefix and bottleneck adapters mixed in one batch.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"apiKey": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "Needed where the operator set keys"}
            },
        },
    }


def _schemas(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    bodies = {endpoint.body for endpoint in endpoints if endpoint.body is not None}
    answers: set[type[BaseModel]] = {ErrorAnswer}
    for endpoint in endpoints:
        answers |= {answer for answer in (*endpoint.answers.values(), endpoint.stream) if isinstance(answer, type)}
    models = sorted(bodies, key=_name), sorted(answers, key=_name)
    _, definitions = models_json_schema(
        [*((model, "validation") for model in models[0]), *((model, "serialization") for model in models[1])],
        ref_template=_REF,
    )
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__ + ("_health" if endpoint.path == "/health" else ""),
        "summary": endpoint.summary,
        "description": endpoint.handler.__doc__ or "",
        "tags": [endpoint.tag],
        "responses": {str(status): _answer(answer) for status, answer in endpoint.answers.items()},
    }
    if endpoint.stream is not None:
        operation["responses"]["200"]["content"]["text/event-stream"] = {
            "schema": _ref(endpoint.stream),
            "x-events": "each `data:` line is one such object; an error after the first is {'error': ...}",
        }
    operation["responses"]["default"] = {"description": "An error", "content": _json(ErrorAnswer)}
    if parameters := _PARAMETER.findall(endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": _json(endpoint.body)}
    elif endpoint.request_body is not None:
        operation["requestBody"] = endpoint.request_body
    if endpoint.public:
        operation["security"] = []
    return operation


def _answer(answer: type[BaseModel] | str) -> dict[str, Any]:
    if isinstance(answer, type):
        return {"description": "Success", "content": _json(answer)}
    return {"description": "Success", "content": {answer: {"schema": {"type": "string"}}} if answer else {}}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(model)}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _name(model: type[BaseModel]) -> str:
    return model.__name__
