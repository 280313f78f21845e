"""The gRPC door on the wire, where the clients' tests do not reach: raw messages, cancels, deadlines, health."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.numpy import save

from peftserve import config
from peftserve.api.grpc import calls
from peftserve.api.grpc.server import build_server
from peftserve.engine.client import EngineState
from peftserve.errors import ConfigurationError
from peftserve_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.adapters.files import lora
from tests.scripted_server import ScriptedEngine, ScriptedServer, make_services, serve


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedServer]:
    async with serve(tmp_path, ScriptedEngine(), max_adapter_bytes=1_000_000) as running:
        yield running


@pytest_asyncio.fixture
async def channel(server: ScriptedServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.target) as opened:
        yield opened


def upload(*parts: tuple[str, Any]) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    for name, value in parts:
        part: dict[str, Any] = {name: adapters_pb2.UploadMetadata(adapter_id=value) if name == "metadata" else value}
        yield adapters_pb2.UploadAdapterRequest(**part)


def tiny_lora() -> tuple[bytes, bytes]:
    made, arrays = lora()
    return json.dumps(made).encode(), save(arrays)


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    trailers: Any = error.trailing_metadata()
    trailers = dict(trailers)
    return status_pb2.Status.FromString(trailers["grpc-status-details-bin"])


async def drain(call: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 5 s"
        await asyncio.sleep(0.005)


async def test_absent_fields_take_the_servers_defaults(server: ScriptedServer, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    call = stub.Generate(inference_pb2.GenerateRequest(prompt="ab"), metadata=(("x-request-id", "mine-1"),))
    responses = [response async for response in call]
    assert sum(len(response.token_ids) for response in responses) == 256
    assert responses[-1].summary.usage.completion_tokens == 256
    assert not responses[-1].summary.HasField("adapter")
    assert not any(response.HasField("summary") for response in responses[:-1])
    assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.logprobs, sampling.seed) == (1.0, 1.0, None, None)


async def test_a_zero_that_was_sent_is_no_default(server: ScriptedServer, channel: grpc.aio.Channel) -> None:
    sampling = inference_pb2.SamplingParams(temperature=0.0, seed=0, logprobs=0, max_tokens=1)
    request = inference_pb2.GenerateRequest(prompt="ab", sampling=sampling)
    [response] = [response async for response in inference_pb2_grpc.InferenceStub(channel).Generate(request)]
    seen = server.engine.requests[0].sampling
    assert (seen.temperature, seen.seed, seen.logprobs) == (0.0, 0, 0)
    assert len(response.logprobs) == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (inference_pb2.GenerateRequest(), None),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "token_ids"),
        (inference_pb2.GenerateRequest(messages=inference_pb2.ChatMessages()), "messages"),
        (
            inference_pb2.GenerateRequest(prompt="x", sampling=inference_pb2.SamplingParams(max_tokens=-1)),
            "sampling.max_tokens",
        ),
        (inference_pb2.GenerateRequest(prompt="x", sampling=inference_pb2.SamplingParams(n=17)), "sampling.n"),
        (inference_pb2.GenerateRequest(prompt="x", sampling=inference_pb2.SamplingParams(top_p=float("nan"))), None),
    ],
)
async def test_bad_requests_name_their_field(
    request_: inference_pb2.GenerateRequest, field: str | None, channel: grpc.aio.Channel
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request_):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = details(caught.value)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "peftserve")
    assert status.message == caught.value.details()
    if field is not None:
        assert info.metadata["field"] == field
        assert status.details[1].Unpack(bad)
        assert bad.field_violations[0].field == field


async def test_cancelling_frees_the_request_at_once(server: ScriptedServer, channel: grpc.aio.Channel) -> None:
    server.engine.delay_s = 0.01
    sampling = inference_pb2.SamplingParams(max_tokens=400, n=3)
    request = inference_pb2.GenerateRequest(prompt="ab", sampling=sampling)
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    await call.read()
    assert len(server.engine.running) == 3
    call.cancel()
    await until(lambda: len(server.engine.aborted) == 3)
    assert not server.engine.running
    assert server.services.generation.num_sequences == 0


async def test_a_client_that_stops_reading_is_aborted(tmp_path: Path) -> None:
    async with (
        serve(tmp_path, ScriptedEngine(delay_s=0.001, per_event=20_000), stream_stall_timeout_s=0.2) as server,
        grpc.aio.insecure_channel(server.target) as channel,
    ):
        request = inference_pb2.GenerateRequest(prompt="ab", sampling=inference_pb2.SamplingParams(max_tokens=500))
        slow = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        await slow.read()
        await until(lambda: len(server.engine.aborted) == 1)
        assert server.services.generation.num_sequences == 0
        value = server.services.metrics.registry.get_sample_value
        assert value("peftserve_streams_stalled_total", {"door": "grpc"}) == 1
        with pytest.raises(grpc.aio.AioRpcError, match=r"read nothing of its stream for 0\.2 s"):
            await drain(slow)


async def test_many_cancels_and_disconnects_leave_nothing(server: ScriptedServer) -> None:
    server.engine.delay_s = 0.002
    request = inference_pb2.GenerateRequest(prompt="ab", sampling=inference_pb2.SamplingParams(max_tokens=400))

    async def leave(number: int) -> None:
        async with grpc.aio.insecure_channel(server.target) as own:
            call = inference_pb2_grpc.InferenceStub(own).Generate(request)
            for _ in range(number % 4):
                await call.read()
            if number % 2:
                call.cancel()

    await asyncio.gather(*(leave(number) for number in range(40)))
    await until(lambda: not server.engine.running)
    assert server.services.generation.num_sequences == 0
    assert "CANCELLED" in server.services.metrics.render().decode()


async def test_the_clients_deadline_is_the_requests(server: ScriptedServer, channel: grpc.aio.Channel) -> None:
    server.engine.delay_s = 0.05
    request = inference_pb2.GenerateRequest(prompt="ab", sampling=inference_pb2.SamplingParams(max_tokens=400))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(server.engine.aborted) == 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "metadata: must be the first message"),
        ((("config", b"{}"),), "metadata: must be the first message"),
        ((("metadata", "law"), ("metadata", "law")), "unexpected metadata message"),
        ((("metadata", "law"), ("weights", b"x"), ("config", b"{}")), "unexpected config message"),
        ((("metadata", "law"), ("config", b"{")), "broken"),
        ((("metadata", "law"), *[("weights", b"x" * 300_000)] * 5), "larger than the limit of 1000000 bytes"),
    ],
)
async def test_bad_uploads_say_why_and_leave_nothing(
    parts: tuple[tuple[str, Any], ...], message: str, server: ScriptedServer, channel: grpc.aio.Channel
) -> None:
    stub = adapters_pb2_grpc.AdaptersStub(channel)
    with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
        await stub.Upload(upload(*parts))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not list((server.store.root / "staging").iterdir())
    assert server.store.list("default") == []


async def test_an_upload_in_many_pieces(channel: grpc.aio.Channel) -> None:
    made, weights = tiny_lora()
    parts: list[tuple[str, Any]] = [("metadata", "law")]
    parts += [("config", made[i : i + 7]) for i in range(0, len(made), 7)]
    parts += [("weights", weights[i : i + 999]) for i in range(0, len(weights), 999)]
    adapter = await adapters_pb2_grpc.AdaptersStub(channel).Upload(upload(*parts))
    assert (adapter.adapter_id, adapter.kind, adapter.details["rank"]) == ("law", "lora", 4)


async def test_a_cancelled_upload_leaves_nothing(server: ScriptedServer, channel: grpc.aio.Channel) -> None:
    async def endless() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
        for message in upload(("metadata", "law"), ("weights", b"x" * 1000)):
            yield message
        await asyncio.Event().wait()

    staging = server.store.root / "staging"
    call = adapters_pb2_grpc.AdaptersStub(channel).Upload(endless())
    await until(lambda: any(staging.iterdir()))
    call.cancel()
    await until(lambda: not any(staging.iterdir()))


async def test_a_refused_client_that_stalls_gets_its_answer(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_DISCARD_S", 0.1)

    async def stalling() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
        for message in upload(("metadata", "Not A Name")):
            yield message
        await asyncio.Event().wait()

    with pytest.raises(grpc.aio.AioRpcError, match="Not A Name") as caught:
        await adapters_pb2_grpc.AdaptersStub(channel).Upload(stalling(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_list_goes_page_by_page(channel: grpc.aio.Channel) -> None:
    stub = adapters_pb2_grpc.AdaptersStub(channel)
    made, weights = tiny_lora()
    for name in ("c", "a", "e", "b", "d"):
        await stub.Upload(upload(("metadata", name), ("config", made), ("weights", weights)))
    names: list[list[str]] = []
    request = adapters_pb2.ListAdaptersRequest(page_size=2)
    while True:
        page = await stub.List(request)
        names.append([adapter.adapter_id for adapter in page.adapters])
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert names == [["a", "b"], ["c", "d"], ["e"]]
    for bad in (adapters_pb2.ListAdaptersRequest(page_size=-1), adapters_pb2.ListAdaptersRequest(page_token="../x")):
        with pytest.raises(grpc.aio.AioRpcError, match="page_"):
            await stub.List(bad)


async def test_update_needs_its_mask(channel: grpc.aio.Channel) -> None:
    stub = adapters_pb2_grpc.AdaptersStub(channel)
    made, weights = tiny_lora()
    await stub.Upload(upload(("metadata", "law"), ("config", made), ("weights", weights)))
    for paths in ([], ["kind"], ["pinned", "kind"]):
        request = adapters_pb2.UpdateAdapterRequest(adapter_id="law", pinned=True)
        request.update_mask.paths.extend(paths)
        with pytest.raises(grpc.aio.AioRpcError, match="update_mask"):
            await stub.Update(request)
    request = adapters_pb2.UpdateAdapterRequest(adapter_id="law", pinned=True)
    request.update_mask.paths.append("pinned")
    assert (await stub.Update(request)).pinned


async def test_health_follows_readiness(server: ScriptedServer, channel: grpc.aio.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="peftserve.v1.Inference"))
    serving = health_pb2.HealthCheckResponse
    assert (await watch.read()).status == serving.SERVING
    server.engine.state = EngineState.RESTARTING
    assert (await watch.read()).status == serving.NOT_SERVING
    server.engine.state = EngineState.READY
    assert (await watch.read()).status == serving.SERVING
    watch.cancel()


async def test_reflection_lists_the_services_behind_the_key(tmp_path: Path) -> None:
    async with serve(tmp_path, api_keys={"key": "a"}) as server, grpc.aio.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([question]), metadata=(("authorization", "Bearer key"),))
        [answer] = [response async for response in call]
        names = {service.name for service in answer.list_services_response.service}
        assert {"peftserve.v1.Inference", "peftserve.v1.Adapters", "grpc.health.v1.Health"} <= names
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [response async for response in stub.ServerReflectionInfo(iter([question]))]
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_bug_shows_an_id_and_nothing_else(
    server: ScriptedServer, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(type(server.services.adapters), "get", broken)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await adapters_pb2_grpc.AdaptersStub(channel).Get(
            adapters_pb2.GetAdapterRequest(adapter_id="x"), metadata=(("x-request-id", "r-7"),)
        )
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    assert "r-7" in str(caught.value.details())


async def test_a_message_over_the_limit_is_refused(channel: grpc.aio.Channel) -> None:
    request = inference_pb2.GenerateRequest(prompt="x" * (config.LimitsConfig().max_body_bytes + 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request):
            pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_two_servers_do_not_share_a_port(server: ScriptedServer, tmp_path: Path) -> None:
    port = int(server.target.rpartition(":")[2])
    services, store = make_services(tmp_path / "second", ScriptedEngine(), grpc_port=port)
    with pytest.raises(ConfigurationError, match=f"grpc_port: cannot listen on 127.0.0.1:{port}"):
        build_server(services)
    store.close()
