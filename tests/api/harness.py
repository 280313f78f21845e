"""The doors over everything real but the model: a scripted engine that yields real token events."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import safetensors.numpy
import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override

from peftserve.adapters.device_quota import DeviceQuota
from peftserve.adapters.store import AdapterStore
from peftserve.api.adapter_service import AdapterService
from peftserve.api.auth import Authenticator
from peftserve.api.engine_metrics import EngineCollector
from peftserve.api.generation import GenerationService
from peftserve.api.http.app import build_app
from peftserve.api.services import Services
from peftserve.config import Config, build
from peftserve.engine.client import EngineState
from peftserve.engine.messages import AdapterResidency, EngineInfo, EngineStats
from peftserve.errors import EngineDeadError
from peftserve.metrics import Metrics
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import AdapterRef, EngineRequest, FinishReason, TokenEvent, TokenLogprobs
from tests.adapters import files
from tests.played_engine import PlayedEngine

MODEL = "tiny-base"
SPEC = msgspec.structs.replace(files.SPEC, vocab_size=320)
CONTEXT = 64

Script = Callable[[EngineRequest], AsyncIterator[TokenEvent]]


def info() -> EngineInfo:
    return EngineInfo(
        spec=SPEC,
        dtype="float32",
        adapter_dtype="float32",
        device="cpu",
        threads=1,
        max_model_len=CONTEXT,
        num_kv_pages=64,
        page_size=16,
        kv_cache_bytes=1 << 20,
        adapter_device_bytes=1 << 20,
        adapter_host_bytes=1 << 20,
        max_adapter_rank=16,
    )


@dataclass
class ScriptedEngine(PlayedEngine):
    """Plays `script` for every request."""

    script: Script
    state: EngineState = EngineState.READY
    info: EngineInfo | None = field(default_factory=info)
    stats: EngineStats = field(default_factory=EngineStats)
    residency: dict[str, AdapterResidency] = field(default_factory=dict)
    restarts: int = 0
    prefetched: list[tuple[str, bool]] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)

    @override
    def play(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        return self.script(request)

    def prefetch(self, adapter: AdapterRef, *, pinned: bool = False) -> None:
        self.prefetched.append((adapter.digest, pinned))

    def unload(self, digest: str) -> None:
        self.unloaded.append(digest)


def says(tokenizer: Tokenizer, text: str, *, per_event: int = 1) -> Script:
    """Answers with the tokens of `text`, then ends as the model does by itself; cut at `max_tokens`."""

    async def script(request: EngineRequest) -> AsyncIterator[TokenEvent]:
        token_ids = tokenizer.encode(text)
        cut = token_ids[: request.sampling.max_tokens]
        for at in range(0, len(cut), per_event):
            part = cut[at : at + per_event]
            await asyncio.sleep(0)
            yield TokenEvent(
                request_id=request.id,
                token_ids=part,
                logprobs=[] if request.sampling.logprobs is None else [_logprobs(t, request) for t in part],
                num_cached_tokens=3 if at == 0 else None,
                queued_s=0.25 if at == 0 else None,
                adapter_wait_s=0.5 if at == 0 else None,
            )
        whole = len(cut) == len(token_ids)
        yield TokenEvent(
            request_id=request.id,
            finish_reason=FinishReason.STOP if whole else FinishReason.LENGTH,
            stop_token_id=2 if whole else None,
        )

    return script


def _logprobs(token_id: int, request: EngineRequest) -> TokenLogprobs:
    count = request.sampling.logprobs or 0
    return TokenLogprobs(token_id, -0.5, [(token_id, -0.5), (65, -1.5), (66, -2.5)][:count])


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another task does; TimeoutError after 5 s."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition has no event of its own
            await asyncio.sleep(0.005)


async def endless(request: EngineRequest) -> AsyncIterator[TokenEvent]:
    """A token now and then, without end."""
    while True:
        yield TokenEvent(request_id=request.id, token_ids=[70])
        await asyncio.sleep(0.005)


async def silent(request: EngineRequest) -> AsyncIterator[TokenEvent]:
    """Nothing ever, as a request that waits in a queue."""
    await asyncio.Event().wait()
    yield TokenEvent(request_id=request.id)


async def dies(request: EngineRequest) -> AsyncIterator[TokenEvent]:
    """Two tokens, then the engine is killed."""
    for token_id in (70, 71):
        yield TokenEvent(request_id=request.id, token_ids=[token_id])
    error = EngineDeadError("the engine stopped while the request was running", retry_after_s=2.0)
    yield TokenEvent(request_id=request.id, finish_reason=FinishReason.ERROR, error=error.to_info())


def resident(ref: AdapterRef) -> AdapterResidency:
    """An adapter that the engine holds."""
    return AdapterResidency(
        digest=ref.digest,
        name=ref.name,
        tenant=ref.tenant,
        kind=ref.kind,
        state="host",
        refs=0,
        pinned=False,
        host_bytes=1,
        device_bytes=0,
    )


@dataclass(frozen=True)
class World:
    """One server's insides."""

    engine: ScriptedEngine
    store: AdapterStore
    services: Services
    app: ASGIApp


def make_world(root: Path, tokenizer: Tokenizer, script: Script, **settings: Any) -> World:
    """`settings`: flat keys of the configuration."""
    config: Config = build({"data_dir": root, **settings})
    engine = ScriptedEngine(script)
    metrics = Metrics(model_name=MODEL, version="0", max_adapter_labels=config.server.max_adapter_labels)
    metrics.registry.register(EngineCollector(engine, model_name=MODEL, max_lora=8))
    store = AdapterStore(
        root / "adapters",
        SPEC,
        limits=config.limits,
        max_rank=16,
        reserved_names={MODEL},
    )
    store.limit_to(
        DeviceQuota.of(
            config.engine,
            adapter_device_bytes=config.engine.adapter_device_bytes or 1 << 20,
            kv_pages=64,
            adapter_dtype="bfloat16",
        )
    )
    adapters = AdapterService(store=store, engine=engine, metrics=metrics, model_name=MODEL)
    services = Services(
        config=config,
        engine=engine,
        generation=GenerationService(
            engine=engine, adapters=adapters, tokenizer=tokenizer, limits=config.limits, metrics=metrics
        ),
        adapters=adapters,
        auth=Authenticator(config.server.api_keys),
        metrics=metrics,
        tokenizer=tokenizer,
        spec=SPEC,
        model_name=MODEL,
        started_at=1e9,
    )
    return World(engine, store, services, build_app(services))


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Any:
        yield


@asynccontextmanager
async def serving(world: World) -> AsyncIterator[str]:
    """The application behind uvicorn; its URL."""
    config = uvicorn.Config(world.app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


def adapter_files(made: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[bytes, bytes]:
    """(adapter_config.json, safetensors) of one of `tests.adapters.files`' adapters."""
    config, arrays = made
    return json.dumps(config).encode(), safetensors.numpy.save(dict(arrays))


def add_adapter(world: World, name: str, made: tuple[Any, Any] | None = None, tenant: str = "default") -> str:
    """Store an adapter; returns its digest."""
    config, weights = adapter_files(made or files.lora())
    with world.store.new_upload(tenant, name) as upload:
        upload.write_config(config)
        upload.write_weights(weights)
        return upload.commit().digest
