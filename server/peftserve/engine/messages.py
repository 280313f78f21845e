"""The only things that cross the pipe between front end and engine: typed msgspec structs, never pickle. A leaf."""

import msgspec

from peftserve.model.spec import ModelSpec
from peftserve.types import AdapterRef, EngineRequest, ErrorInfo, TokenEvent


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message down: what to load. `config` is an `EngineConfig` as JSON, `checkpoint` a prepared folder."""

    config: str
    checkpoint: str
    log_level: str = "info"
    log_format: str = "console"


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Start a request. The engine answers with events, the last of which has a finish reason."""

    request: EngineRequest


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    """Stop a request and free what it holds within a step. Unknown ids are ignored: the end may have crossed."""

    request_id: str


class PrefetchAdapter(msgspec.Struct, frozen=True, tag=True):
    """Bring an adapter to the host tier; `pinned` keeps it on the device and never evicts it."""

    adapter: AdapterRef
    pinned: bool = False


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Drop an adapter from all tiers as soon as no request uses it."""

    digest: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Fail what is running and exit. Draining happens before, in the front end."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered with a `StepUpdate` even when idle, so that a hang shows."""


Command = Start | AddRequest | AbortRequest | PrefetchAdapter | UnloadAdapter | Shutdown | Ping


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine settled on at start. Sizes in bytes, lengths in tokens."""

    spec: ModelSpec
    dtype: str
    adapter_dtype: str
    device: str
    threads: int
    max_model_len: int
    num_kv_pages: int
    page_size: int
    kv_cache_bytes: int
    adapter_device_bytes: int
    adapter_host_bytes: int
    max_adapter_rank: int
    int8_activations: bool = False


class AdapterResidency(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter in the engine's cache. `state` is the name of an `adapter_cache.AdapterState`."""

    digest: str
    name: str
    tenant: str
    kind: str
    state: str
    refs: int
    pinned: bool
    host_bytes: int
    device_bytes: int
    load_s: float | None = None
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters after a step. Counters only grow while one engine process lives."""

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_adapter: int = 0
    kv_pages_total: int = 0
    kv_pages_used: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    adapter_device_bytes_used: int = 0
    adapter_host_bytes_used: int = 0
    adapter_loads: int = 0
    adapter_load_failures: int = 0
    adapter_evictions_device: int = 0
    adapter_evictions_host: int = 0
    running_adapters: list[str] = []  # names of the adapters that running requests use
    waiting_adapters: list[str] = []


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; requests are served from now on."""

    info: EngineInfo


class StepUpdate(msgspec.Struct, frozen=True, tag=True):
    """One message a step: everything that the step produced. `step_s` and `schedule_s` in seconds.

    `residency` holds the adapters whose residency has changed since the last message, `gone` the digests of those that
    left all tiers.
    """

    events: list[TokenEvent]
    stats: EngineStats
    step_s: float = 0.0
    num_batch_tokens: int = 0
    residency: list[AdapterResidency] = []
    gone: list[str] = []


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; it exits after this."""

    error: ErrorInfo


Update = Ready | StepUpdate | Fatal
