"""Both front doors on loopback over a scripted engine: everything is real but the model.

The engine echoes: it answers with the prompt's own bytes, one token each, then goes on with spaces. So a test knows
every answer beforehand, and can make the engine wait, fail or forget it was asked.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import uvicorn
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from typing_extensions import override

from peftserve import config
from peftserve.adapters.store import AdapterStore
from peftserve.api.adapter_service import AdapterService
from peftserve.api.auth import DEFAULT_TENANT, Authenticator
from peftserve.api.generation import GenerationService
from peftserve.api.grpc.server import GrpcServer, build_server
from peftserve.api.http.app import build_app
from peftserve.api.services import Services
from peftserve.engine.client import EngineState
from peftserve.engine.messages import AdapterResidency, EngineInfo, EngineStats
from peftserve.errors import PeftserveError
from peftserve.metrics import Metrics
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import AdapterRef, EngineRequest, FinishReason, TokenEvent, TokenLogprobs
from tests.adapters.files import SPEC
from tests.played_engine import PlayedEngine

MODEL = "tiny"
MAX_LEN = 512
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


@dataclass
class ScriptedEngine(PlayedEngine):
    """`delay_s` passes before each event of `per_event` equal tokens. After `fail_after` of them comes `error`."""

    delay_s: float = 0.0
    per_event: int = 1
    fail_after: int | None = None
    error: PeftserveError | None = None
    state: EngineState = EngineState.READY
    stats: EngineStats = field(default_factory=EngineStats)
    residency: dict[str, AdapterResidency] = field(default_factory=dict)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            spec=msgspec.structs.replace(SPEC, vocab_size=257),
            dtype="float32",
            adapter_dtype="float32",
            device="cpu",
            threads=1,
            max_model_len=MAX_LEN,
            num_kv_pages=64,
            page_size=16,
            kv_cache_bytes=2**20,
            adapter_device_bytes=2**20,
            adapter_host_bytes=2**20,
            max_adapter_rank=16,
        )

    @override
    async def play(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        for count in range(request.sampling.max_tokens):
            await asyncio.sleep(self.delay_s)
            if count == self.fail_after and self.error is not None:
                yield TokenEvent(request_id=request.id, finish_reason=FinishReason.ERROR, error=self.error.to_info())
            prompt = request.prompt_token_ids
            token = prompt[count] if count < len(prompt) else ord(" ")
            wanted = request.sampling.logprobs
            last = count == request.sampling.max_tokens - 1
            yield TokenEvent(
                request_id=request.id,
                token_ids=[token] * self.per_event,
                logprobs=[] if wanted is None else [TokenLogprobs(token, -0.5, [(token, -0.5)] * min(wanted, 1))],
                finish_reason=FinishReason.LENGTH if last else None,
                num_cached_tokens=0 if count == 0 else None,
                queued_s=0.0 if count == 0 else None,
                adapter_wait_s=0.0 if count == 0 else None,
            )

    def prefetch(self, adapter: AdapterRef, pinned: bool = False) -> None:
        self.residency[adapter.digest] = AdapterResidency(
            digest=adapter.digest,
            name=adapter.name,
            tenant=adapter.tenant,
            kind=adapter.kind,
            state="device" if pinned else "host",
            refs=0,
            pinned=pinned,
            host_bytes=1024,
            device_bytes=1024 if pinned else 0,
            load_s=0.01,
        )

    def unload(self, digest: str) -> None:
        self.residency.pop(digest, None)


@dataclass
class ScriptedServer:
    """A running server and what is behind it."""

    engine: ScriptedEngine
    services: Services
    store: AdapterStore
    url: str
    target: str

    def reset(self) -> None:
        """As if just started: no adapters, and an engine that does nothing special."""
        for record in self.store.list(DEFAULT_TENANT):
            self.store.set_pinned(record.tenant, record.name, False)
            self.store.delete(record.tenant, record.name)
        vars(self.engine).update(vars(ScriptedEngine()))


def byte_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, with id = byte value, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(["<end>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    return Tokenizer(folder)


def make_services(folder: Path, engine: ScriptedEngine, **settings: object) -> tuple[Services, AdapterStore]:
    """Services over `engine`; `settings` are flat keys of `config`."""
    built = config.build({"data_dir": folder, "port": 0, "grpc_port": 0, **settings})
    metrics = Metrics(model_name=MODEL, version="0", max_adapter_labels=10)
    store = AdapterStore(folder / "adapters", SPEC, limits=built.limits, max_rank=16)
    adapters = AdapterService(store=store, engine=engine, metrics=metrics, model_name=MODEL)
    tokenizer = byte_tokenizer(folder / "model")
    generation = GenerationService(
        engine=engine, adapters=adapters, tokenizer=tokenizer, limits=built.limits, metrics=metrics
    )
    services = Services(
        config=built,
        engine=engine,
        generation=generation,
        adapters=adapters,
        auth=Authenticator(built.server.api_keys),
        metrics=metrics,
        tokenizer=tokenizer,
        spec=SPEC,
        model_name=MODEL,
        started_at=time.time(),
    )
    return services, store


@asynccontextmanager
async def serve(
    folder: Path, engine: ScriptedEngine | None = None, **settings: object
) -> AsyncIterator[ScriptedServer]:
    """Both doors on free ports for as long as the block runs."""
    engine = engine or ScriptedEngine()
    services, store = make_services(folder, engine, **settings)
    grpc_server = build_server(services)
    await grpc_server.start()
    http = uvicorn.Server(uvicorn.Config(build_app(services), port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(http.serve())
    try:
        while not http.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        port = http.servers[0].sockets[0].getsockname()[1]
        url, target = f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_server.port}"
        yield ScriptedServer(engine, services, store, url, target)
    finally:
        await _stop(grpc_server, http, serving)
        store.close()


async def _stop(grpc_server: GrpcServer, http: uvicorn.Server, serving: "asyncio.Task[None]") -> None:
    http.should_exit = True
    http.force_exit = True
    await grpc_server.stop(0)
    await serving


def _byte_of(letter: str) -> int:
    """GPT-2's byte table, backwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return ord(letter) if ord(letter) in printable else others[ord(letter) - 256]
