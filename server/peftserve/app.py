"""The only file that wires everything: model, engine, adapter store, services, both listeners, signals, drain."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import anyio.to_thread
import uvicorn
import uvloop
from prometheus_client import disable_created_metrics

from peftserve import __version__, log, memory
from peftserve.adapters.blobs import adapters_root
from peftserve.adapters.device_quota import DeviceQuota
from peftserve.adapters.store import AdapterStore
from peftserve.api.adapter_service import AdapterService
from peftserve.api.auth import Authenticator
from peftserve.api.engine_metrics import EngineCollector
from peftserve.api.generation import GenerationService
from peftserve.api.grpc.server import build_server
from peftserve.api.http.app import build_app
from peftserve.api.services import Services
from peftserve.config import Config
from peftserve.engine.client import EngineClient
from peftserve.engine.messages import EngineInfo
from peftserve.errors import ConfigurationError
from peftserve.metrics import Metrics
from peftserve.model.config_reader import read_spec
from peftserve.model.prepare import find_prepared, prepare
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import AdapterRef

logger = log.get_logger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_LISTENERS_STOP_S = 5.0  # after the drain nothing should be left; this bounds what is
_HOUSEKEEPING_S = 600.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the server listens, with the ports really bound."""

    http: str
    grpc: str


def run(config: Config, ready: Callable[[Addresses], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ConfigurationError` and its kin if the server cannot start."""
    memory.share_one_heap()
    uvloop.run(serve(config, ready))


async def serve(config: Config, ready: Callable[[Addresses], None] | None = None) -> None:
    """As `run`, in the running loop. `ready` is called once requests are accepted; cancelling stops without a drain."""
    log.configure(config.server.log_level, config.server.log_format)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of the series, and nobody reads them
    with _listen(config.server.host, config.server.port, config.limits.stream_stall_timeout_s) as listener:
        await _serve(config, listener, ready)


async def _serve(config: Config, listener: socket.socket, ready: Callable[[Addresses], None] | None) -> None:
    async with _services(config) as services, _listeners(services, listener) as (addresses, failed):
        # Only from here on: while the model is being prepared, a signal may end the process the usual way.
        with _stop_signals() as stop:
            starting = asyncio.ensure_future(services.engine.start())
            stopping = asyncio.ensure_future(stop.asked.wait())
            ends: set[asyncio.Future[Any]] = {stopping, failed}
            try:
                await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    memory.release_freed()
                    memory.drop_library_pages()
                    _announce(addresses, services.model_name, starting.result())
                    if ready is not None:
                        ready(addresses)
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    failed.result()
                await _drain(services, stop)
            finally:
                starting.cancel()
                stopping.cancel()


@asynccontextmanager
async def _services(config: Config) -> AsyncIterator["RunningServices"]:
    """Everything behind the doors; the engine is made but not started."""
    checkpoint = await _checkpoint(config)
    spec = read_spec(checkpoint)
    tokenizer = Tokenizer(checkpoint)
    model_name = config.server.served_model_name or Path(config.engine.model).name.removesuffix(".gguf")
    metrics = Metrics(model_name=model_name, version=__version__, max_adapter_labels=config.server.max_adapter_labels)
    store = await anyio.to_thread.run_sync(
        lambda: AdapterStore(
            adapters_root(config.engine.data_dir),
            spec,
            limits=config.limits,
            max_rank=config.engine.max_adapter_rank,
            reserved_names={model_name},
        )
    )
    restoring: set[asyncio.Task[None]] = set()

    def on_ready(info: EngineInfo, held_before: Sequence[AdapterRef]) -> None:
        metrics.engine_started()
        quota = DeviceQuota.of(
            config.engine,
            adapter_device_bytes=info.adapter_device_bytes,
            kv_pages=info.num_kv_pages,
            adapter_dtype=info.adapter_dtype,
        )
        store.limit_to(quota)
        task = asyncio.get_running_loop().create_task(adapters.restore(held_before))
        restoring.add(task)
        task.add_done_callback(restoring.discard)

    engine = EngineClient(
        config.engine,
        checkpoint,
        hang_timeout_s=config.server.hang_timeout_s,
        log_level=config.server.log_level,
        log_format=config.server.log_format,
        on_update=metrics.engine_update,
        on_ready=on_ready,
    )
    metrics.registry.register(
        EngineCollector(engine, model_name=model_name, max_lora=config.engine.max_device_adapters)
    )
    adapters = AdapterService(store=store, engine=engine, metrics=metrics, model_name=model_name)
    generation = GenerationService(
        engine=engine, adapters=adapters, tokenizer=tokenizer, limits=config.limits, metrics=metrics
    )
    housekeeping = asyncio.create_task(_housekeeping(adapters))
    try:
        yield RunningServices(
            config=config,
            engine=engine,
            generation=generation,
            adapters=adapters,
            auth=Authenticator(config.server.api_keys),
            metrics=metrics,
            tokenizer=tokenizer,
            spec=spec,
            model_name=model_name,
            started_at=time.time(),
        )
    finally:
        housekeeping.cancel()
        await engine.stop()
        await asyncio.gather(housekeeping, *restoring, return_exceptions=True)
        store.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServices(Services):
    """`Services` whose engine is the process that this module starts and stops."""

    engine: EngineClient


@asynccontextmanager
async def _listeners(
    services: Services, listener: socket.socket
) -> AsyncIterator[tuple[Addresses, "asyncio.Future[None]"]]:
    """Both doors, open from the start so that probes see the engine load; the future ends if one closes by itself."""
    grpc_server = build_server(services)
    http_server = _HttpServer(
        uvicorn.Config(
            build_app(services),
            http="httptools",
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_LISTENERS_STOP_S),
        )
    )
    serving = asyncio.ensure_future(http_server.serve(sockets=[listener]))
    try:
        await grpc_server.start()
        host = _bracketed(services.config.server.host)
        http = f"http://{host}:{listener.getsockname()[1]}"
        yield Addresses(http=http, grpc=f"{host}:{grpc_server.port}"), serving
    finally:
        http_server.should_exit = True
        await grpc_server.stop(_LISTENERS_STOP_S)
        await serving


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: on SIGTERM we drain first, and probes must still be answered."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _checkpoint(config: Config) -> Path:
    """The prepared checkpoint. What has to be converted first is, in a child: this process never imports torch."""
    model, data_dir = config.engine.model, config.engine.data_dir
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"data_dir: cannot write to {data_dir}: {error.strerror}", field="data_dir") from error
    found = find_prepared(model, data_dir)
    if found is not None:
        return found
    logger.info("preparing the model; this happens once", model=model)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, prepare, model, data_dir)


def _end_with_parent() -> None:
    """In a pool's child: a signal that ends the parent, which handles none yet, must not leave the child behind."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


async def _housekeeping(adapters: AdapterService) -> None:
    """Now and then delete the bytes of adapters that are gone."""
    while True:
        await asyncio.sleep(_HOUSEKEEPING_S)
        try:
            removed = await adapters.collect_garbage()
        except Exception:  # a full or slow disk must not end the server; the next round tries again
            logger.exception("cannot clean the adapter store up")
        else:
            if removed:
                logger.info("adapter bytes deleted", count=len(removed))


async def _drain(services: Services, stop: "_Stop") -> None:
    """Refuse new requests and let the running ones end, up to `drain_s`, or until a second signal."""
    generation, drain_s = services.generation, services.config.server.drain_s
    if generation.num_sequences:
        logger.info("draining", running=generation.num_sequences, up_to_s=drain_s)
    draining = asyncio.ensure_future(generation.drain(drain_s))
    again = asyncio.ensure_future(stop.insisted.wait())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not draining.done():
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await generation.drain(0.0)


class _Stop:
    """`asked` is set by the first stop signal, `insisted` by a second one."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def on_signal(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.on_signal)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _listen(host: str, port: int, stall_timeout_s: float) -> socket.socket:
    """Bound before the model loads: a port that is taken should be told at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"port: cannot listen on {host}:{port}: {error.strerror}", field="port") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it: closing one waits until its client has read the rest, and some never do.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stall_timeout_s * 1000))
    return listener


def _announce(addresses: Addresses, model_name: str, info: EngineInfo) -> None:
    precision = info.dtype
    if info.int8_activations:
        precision += ", int8 activations"
    if info.adapter_dtype != info.dtype:
        precision += f", {info.adapter_dtype} adapters"
    model = f"{model_name} ({precision}, {info.device})"
    sys.stdout.write(f"peftserve is ready: {model} on {addresses.http} and gRPC {addresses.grpc}\n")
    sys.stdout.flush()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
