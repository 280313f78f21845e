"""The front end's handle on the engine process: starts it, talks to it, notices when it dies or hangs, restarts it."""

import asyncio
import contextlib
import enum
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peftserve.config import EngineConfig
from peftserve.engine import channel
from peftserve.engine.adapter_entry import AdapterState
from peftserve.engine.messages import (
    AbortRequest,
    AdapterResidency,
    AddRequest,
    Command,
    EngineInfo,
    EngineStats,
    Fatal,
    Ping,
    PrefetchAdapter,
    Ready,
    Shutdown,
    Start,
    StepUpdate,
    UnloadAdapter,
    Update,
)
from peftserve.errors import EngineDeadError, PeftserveError, UnavailableError, from_info
from peftserve.log import get_logger
from peftserve.types import AdapterKind, AdapterRef, EngineRequest, FinishReason, TokenEvent

log = get_logger(__name__)

_PING_S = 2.0
_STOP_S = 5.0
_BACKOFF_S = (0.2, 1.0, 5.0, 15.0, 30.0)  # between restarts that follow one another; the last repeats
_STABLE_S = 60.0  # an engine that lived this long starts again without delay
_READ_SIZE = 1 << 16
_RESIDENT = frozenset({AdapterState.HOST.value, AdapterState.DEVICE.value})

Take = Callable[[TokenEvent], None]


class EngineState(enum.StrEnum):
    """What the front end may expect of the engine."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"  # could not start at all; `failure` says why
    STOPPED = "stopped"


class EngineClient:
    """One engine process at a time, over a socket pair. All methods belong to one event loop.

    `on_update` sees every `StepUpdate` (metrics). `on_ready` is called after each start, after a restart with the
    adapters that the last engine held, so that those still wanted can be brought back.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Path,
        *,
        hang_timeout_s: float,
        log_level: str = "info",
        log_format: str = "console",
        on_update: Callable[[StepUpdate], None] | None = None,
        on_ready: Callable[[EngineInfo, Sequence[AdapterRef]], None] | None = None,
    ) -> None:
        self.state = EngineState.STOPPED
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.residency: dict[str, AdapterResidency] = {}
        self.restarts = 0
        self.failure: PeftserveError | None = None
        self._start_message = Start(
            config=config.model_dump_json(), checkpoint=str(checkpoint), log_level=log_level, log_format=log_format
        )
        self._hang_timeout_s = hang_timeout_s
        self._on_update = on_update
        self._on_ready = on_ready
        self._held_before: list[AdapterRef] = []
        self._takers: dict[str, Take] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._process: asyncio.subprocess.Process | None = None
        self._silent_ticks = 0
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self._process.pid if self._process else None

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Start the process and wait until it serves. Raises what kept it from starting."""
        self.state = EngineState.STARTING
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        async with self._changed:
            await self._changed.wait_for(lambda: self.state is not EngineState.STARTING)
        if self.info is None:
            raise self.failure or UnavailableError("the engine did not start")
        return self.info

    async def stop(self) -> None:
        """End the process; what still runs ends with an error event."""
        if self._supervisor is None:
            return
        supervisor, self._supervisor = self._supervisor, None
        await self._set_state(EngineState.STOPPED)
        self._stopping.set()
        self._send(Shutdown())
        done, _ = await asyncio.wait({supervisor}, timeout=_STOP_S)
        if not done:
            log.warning("engine did not stop in time; killing it", pid=self.pid)
            if self._process is not None:
                self._process.kill()
            await supervisor
        self._fail_requests(UnavailableError("the server is shutting down"))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the engine serves; TimeoutError after `timeout_s`."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self.state is EngineState.READY), timeout_s)

    # -- work ----------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, take: Take) -> None:
        """Run a request: `take` is called with each of its events, the last of which has a finish reason.

        It is called from the loop and must neither block nor raise. A plain call, since a token's way through the front
        end is what limits the tokens a second that are served. Raises UnavailableError (with `retry_after_s`) while no
        engine serves.
        """
        if self.state is not EngineState.READY:
            raise UnavailableError(f"the engine is {self.state}; try again", retry_after_s=2.0)
        self._takers[request.id] = take
        self._send(AddRequest(request=request))

    def abort(self, request_id: str) -> None:
        """End a request; nothing more comes of it. Does nothing after its last event."""
        if self._takers.pop(request_id, None) is not None:
            self._send(AbortRequest(request_id=request_id))

    def prefetch(self, adapter: AdapterRef, *, pinned: bool = False) -> None:
        """Bring an adapter to the engine's memory before it is asked for; `pinned` keeps it on the device."""
        self._send(PrefetchAdapter(adapter=adapter, pinned=pinned))

    def unload(self, digest: str) -> None:
        """Drop an adapter from the engine's memory when its last request is done. The next engine does not get it."""
        self._held_before = [ref for ref in self._held_before if ref.digest != digest]
        self._send(UnloadAdapter(digest=digest))

    # -- inside --------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep an engine running until `stop`."""
        attempt = 0
        while True:
            started = time.monotonic()
            try:
                await self._run_process()
            except Exception as error:  # no process or memory to be had, say: to be tried again like a crash
                log.exception("engine could not be run")
                self.failure = EngineDeadError(f"the engine could not be run: {error}", retry_after_s=5.0)
            if self.state is EngineState.STOPPED:
                return
            if self.info is None:
                await self._set_state(EngineState.FAILED)  # the first start failed: its cause will not go away
                return
            lived = time.monotonic() - started
            attempt = 0 if lived > _STABLE_S else attempt + 1
            delay = 0.0 if attempt == 0 else _BACKOFF_S[min(attempt, len(_BACKOFF_S)) - 1]
            self.restarts += 1
            log.error("engine died; restarting", lived_s=round(lived, 1), delay_s=delay, restarts=self.restarts)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
                return

    async def _run_process(self) -> None:
        """One life of the process, from its start to its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: what lies in the current directory is no module of ours
                *("-P", "-m", "peftserve.engine.process", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        self._process = process
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(channel.encode(self._start_message))
        watchdog = asyncio.create_task(self._watch(process), name="engine-watchdog")
        try:
            await self._read_updates(reader)
        finally:
            watchdog.cancel()
            self._writer.close()
            self._writer = None
            await _reap(process)
            self._process = None
            if self.state is EngineState.READY:
                await self._set_state(EngineState.RESTARTING)
            self.stats = EngineStats()
            # What was on its way may be what ended the engine, and would end the next one.
            held = [adapter for adapter in self.residency.values() if adapter.state in _RESIDENT]
            self._held_before += map(_ref, held)
            self.residency = {}
            self._fail_requests(EngineDeadError("the engine stopped while the request was running", retry_after_s=2.0))

    async def _read_updates(self, reader: asyncio.StreamReader) -> None:
        """Take messages in until the process closes the channel."""
        decoder = channel.update_decoder()
        while data := await _read(reader):
            self._silent_ticks = 0
            for update in decoder.feed(data):
                await self._take(update)

    async def _take(self, update: Update) -> None:
        match update:
            case StepUpdate():
                self.stats = update.stats
                self.residency.update((adapter.digest, adapter) for adapter in update.residency)
                for digest in update.gone:
                    self.residency.pop(digest, None)
                for event in update.events:
                    self._dispatch(event)
                if self._on_update:
                    self._on_update(update)
            case Ready(info=info):
                self.info = info
                held, self._held_before = self._held_before, []
                if self._on_ready:
                    self._on_ready(info, held)
                if self.state is not EngineState.STOPPED:
                    await self._set_state(EngineState.READY)
            case Fatal(error=error):
                self.failure = from_info(error)
                log.error("engine cannot run", error=error.message)

    def _dispatch(self, event: TokenEvent) -> None:
        final = event.finish_reason is not None
        take = self._takers.pop(event.request_id, None) if final else self._takers.get(event.request_id)
        if take is not None:
            take(event)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that answers nothing for `hang_timeout_s`.

        Silence is counted in ticks of this task, not by the clock: if the front end itself was held up (a suspended
        laptop), the engine's answers are waiting in the socket and must be read first.
        """
        self._silent_ticks = 0
        while True:
            await asyncio.sleep(_PING_S)
            if self.state is not EngineState.READY:
                continue
            self._silent_ticks += 1
            if self._silent_ticks * _PING_S > self._hang_timeout_s:
                log.error("engine hangs; killing it", pid=process.pid, silent_s=self._silent_ticks * _PING_S)
                process.kill()
                return
            if self._silent_ticks > 1:
                self._send(Ping())

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(channel.encode(command))

    def _fail_requests(self, error: PeftserveError) -> None:
        takers, self._takers = self._takers, {}
        for request_id, take in takers.items():
            take(TokenEvent(request_id=request_id, finish_reason=FinishReason.ERROR, error=error.to_info()))

    async def _set_state(self, state: EngineState) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_READ_SIZE)
    except ConnectionError:
        return b""  # killed with data of ours unread


async def _reap(process: asyncio.subprocess.Process) -> None:
    """The channel is closed: the process has ended, is about to, or must be made to."""
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _ref(adapter: AdapterResidency) -> AdapterRef:
    return AdapterRef(digest=adapter.digest, kind=AdapterKind(adapter.kind), name=adapter.name, tenant=adapter.tenant)
