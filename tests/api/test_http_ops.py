"""Everything else over HTTP: probes, keys, ids, errors of routing, caps, tokens, models, metrics, the document."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from peftserve.api.http import responses
from peftserve.api.http.app import ENDPOINTS
from peftserve.api.request import Delta
from peftserve.api.sequence import SequenceOutput
from peftserve.engine.client import EngineState
from peftserve.engine.messages import AdapterResidency, EngineStats, StepUpdate
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import TokenEvent
from tests.api.conftest import MakeWorld, client_of
from tests.api.harness import World, add_adapter

KEYS = {"key-a": "a", "key-b": "b"}


@pytest.mark.parametrize("path", ["/readyz", "/health"])
async def test_readiness(client: httpx.AsyncClient, world: World, path: str) -> None:
    assert (await client.get(path)).json() == {"status": "ready"}
    world.engine.state = EngineState.RESTARTING
    response = await client.get(path)
    assert (response.status_code, response.json()) == (503, {"status": "restarting"})
    world.engine.state = EngineState.READY
    await world.services.generation.drain(0.0)
    response = await client.get(path)
    assert (response.status_code, response.json()) == (503, {"status": "draining"})
    assert (await client.get("/livez")).status_code == 200


async def test_keys_guard_every_route_but_the_probes_and_the_dashboard(make: MakeWorld) -> None:
    async with client_of(make(api_keys=KEYS)) as client:
        open_routes = set()
        for path, method in [(e.path.replace("{adapter_id}", "x"), e.method) for e in ENDPOINTS] + [
            ("/openapi.json", "GET"),
            ("/nowhere", "GET"),
        ]:
            response = await client.request(method, path)
            if response.status_code == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                assert responses.ErrorAnswer.model_validate(response.json()).error.code == "unauthenticated"
            else:
                open_routes.add(path)
        assert open_routes == {"/livez", "/readyz", "/health", "/dashboard", "/dashboard/grafana.json"}


async def test_the_key_decides_the_tenant(make: MakeWorld) -> None:
    world = make(api_keys=KEYS)
    add_adapter(world, "mine", tenant="a")
    for key, names in (("key-a", ["tiny-base", "mine"]), ("key-b", ["tiny-base"])):
        async with client_of(world, headers={"authorization": f"Bearer {key}"}) as client:
            models = responses.ModelList.model_validate((await client.get("/v1/models")).json())
            assert [model.id for model in models.data] == names
            status = (await client.post("/v1/generate", json={"prompt": "x", "adapter_id": "mine"})).status_code
            assert status == (200 if key == "key-a" else 404)
    tenants = [request.tenant for request in world.engine.requests]
    assert tenants == ["a"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/v1/generate", 405, "method_not_allowed"),
        ("POST", "/v1/adapters/x", 405, "method_not_allowed"),
    ],
)
async def test_routing_errors_have_the_same_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert responses.ErrorAnswer.model_validate(response.json()).error.code == code
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(("given", "kept"), [("my-id.1:2", True), ("x" * 129, False), ("a b", False), ("<x>", False)])
async def test_request_ids(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    response = await client.get("/livez", headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is kept
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("declared", [True, False])
async def test_bodies_are_capped(make: MakeWorld, declared: bool) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1024
            yield b" " * 1024

    async with client_of(make(max_body_bytes=4096)) as client:
        headers = {"content-length": "100000"} if declared else {}
        response = await client.post("/v1/generate", content=body(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    assert "4096" in response.json()["error"]["message"]
    assert sent <= (0 if declared else 6 * 1024)


async def test_an_empty_body_is_told_what_is_needed(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions")
    assert response.json()["error"]["message"] == (
        "the body is empty; a JSON object is needed (required: model, messages)"
    )


@pytest.mark.parametrize("stream", [True, False])
async def test_bugs_are_opaque(make: MakeWorld, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    def buggy(self: SequenceOutput, event: TokenEvent, now: float) -> Delta:
        raise KeyError("secret")

    monkeypatch.setattr(SequenceOutput, "take", buggy)
    async with client_of(make()) as client:
        body, headers = {"prompt": "x", "stream": stream}, {"x-request-id": "find-me"}
        with capture_logs() as logs:
            response = await client.post("/v1/generate", json=body, headers=headers)
    assert response.status_code == 500
    error = responses.ErrorAnswer.model_validate(response.json()).error
    assert error.code == "internal"
    assert error.message == "internal error; the server's log has it under request id find-me"
    assert [(entry["request_id"], repr(entry["exc_info"])) for entry in logs] == [("find-me", "KeyError('secret')")]


async def test_models(client: httpx.AsyncClient, world: World) -> None:
    add_adapter(world, "mine")
    base, adapter = responses.ModelList.model_validate((await client.get("/v1/models")).json()).data
    assert (base.id, base.parent, base.max_model_len) == ("tiny-base", None, 64)
    assert (adapter.id, adapter.parent) == ("mine", "tiny-base")
    for model in (base, adapter):
        assert (await client.get(f"/v1/models/{model.id}")).json() == model.model_dump()
    missing = await client.get("/v1/models/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_tokenize_and_back(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {"prompt": "hé 😀", "return_token_strs": True}
    tokens = responses.Tokens.model_validate((await client.post("/tokenize", json=body)).json())
    assert tokens.tokens == tokenizer.encode("hé 😀")
    assert tokens.count == len(tokens.tokens) == len(tokens.token_strs or [])
    text = (await client.post("/detokenize", json={"tokens": tokens.tokens})).json()
    assert text == {"prompt": "hé 😀"}
    chat = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert chat.json()["tokens"] == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    refused = await client.post("/detokenize", json={"tokens": [320]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


async def test_version(client: httpx.AsyncClient) -> None:
    version = responses.Version.model_validate((await client.get("/version")).json())
    assert version.kinds == ["lora", "prefix", "bottleneck"]


def update(**stats: Any) -> StepUpdate:
    return StepUpdate(events=[], stats=EngineStats(**stats), step_s=0.01, num_batch_tokens=7)


async def test_metrics(client: httpx.AsyncClient, world: World) -> None:
    metrics = world.services.metrics
    metrics.engine_update(update(step=1, adapter_loads=2, prefix_cache_hits=5))
    metrics.engine_update(update(step=2, adapter_loads=3, prefix_cache_hits=5))
    metrics.engine_started()  # a new process counts from zero
    metrics.engine_update(update(step=1, adapter_loads=1))
    world.engine.stats = EngineStats(
        num_running=2, num_waiting=3, num_waiting_adapter=1, kv_pages_total=8, kv_pages_used=2, running_adapters=["x"]
    )
    residency = AdapterResidency(
        digest="d",
        name="x",
        tenant="default",
        kind="lora",
        state="device",
        refs=1,
        pinned=False,
        host_bytes=1,
        device_bytes=1,
        load_s=0.2,
    )
    world.engine.residency = {"d": residency}
    for _ in range(2):  # the same load, reported twice
        metrics.engine_update(StepUpdate(events=[], stats=EngineStats(adapter_loads=1), residency=[residency]))
    await client.post("/v1/generate", json={"prompt": "x"})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    model = ("model_name", "tiny-base")
    assert samples["vllm:num_requests_running", model] == 2
    assert samples["vllm:num_requests_waiting", model] == 4
    assert samples["vllm:kv_cache_usage_perc", model] == 0.25
    assert samples["vllm:prefix_cache_hits_total", model] == 5
    assert samples["peftserve_adapter_loads_total", model] == 4
    assert samples["peftserve_adapter_load_seconds_count", ("kind", "lora")] == 1
    assert samples["peftserve_adapters", ("kind", "lora"), ("state", "device")] == 1
    assert samples["peftserve_engine_state", ("state", "ready")] == 1
    assert samples["peftserve_step_seconds_count",] == 3
    lora = ("max_lora", "8"), ("running_lora_adapters", "x"), ("waiting_lora_adapters", "")
    assert samples["vllm:lora_requests_info", *lora] > 1e9
    route = ("method", "POST"), ("route", "/v1/generate"), ("status", "200")
    assert samples["peftserve_http_requests_total", *route] == 1


async def test_metrics_of_odd_requests_stay_few(client: httpx.AsyncClient, world: World) -> None:
    for path in ("/a", "/b", "/v1/adapters/x", "/v1/adapters/y"):
        await client.get(path)
    await client.request("BREW", "/a")
    value = world.services.metrics.registry.get_sample_value
    name = "peftserve_http_requests_total"
    assert value(name, {"method": "GET", "route": "unknown", "status": "404"}) == 2
    assert value(name, {"method": "GET", "route": "/v1/adapters/{adapter_id}", "status": "404"}) == 2
    assert value(name, {"method": "other", "route": "unknown", "status": "404"}) == 1


async def test_the_openapi_document(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    operations = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert operations == {(e.method, e.path.replace(":path", "")) for e in ENDPOINTS}
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(ids)) == len(ids)
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert references <= document["components"]["schemas"].keys()
    body = document["components"]["schemas"]["Sampling"]
    assert body["properties"]["top_p"]["maximum"] == 1
    assert body["additionalProperties"] is False
