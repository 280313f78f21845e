"""One adapter version in the cache: a state machine with one transition table."""

import enum
import time
from dataclasses import dataclass, field

from peftserve.engine.adapter_memory import HostAdapter, Placement
from peftserve.engine.messages import AdapterResidency
from peftserve.errors import PeftserveError
from peftserve.types import AdapterRef


class AdapterState(enum.Enum):
    """Where an adapter version is. Absent ones have no entry."""

    LOADING = "loading"  # on its way from disk to host, or from host to device
    HOST = "host"
    DEVICE = "device"
    FAILED = "failed"


_TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    AdapterState.LOADING: frozenset({AdapterState.HOST, AdapterState.DEVICE, AdapterState.FAILED}),
    AdapterState.HOST: frozenset({AdapterState.LOADING, AdapterState.FAILED}),
    AdapterState.DEVICE: frozenset({AdapterState.HOST}),
    AdapterState.FAILED: frozenset({AdapterState.LOADING}),
}


@dataclass(eq=False, slots=True)
class AdapterEntry:
    ref: AdapterRef
    state: AdapterState = AdapterState.LOADING
    num_virtual_tokens: int | None = None  # prefix length, known after the first load
    host: HostAdapter | None = None  # kept beside the device copy, whole or lent, while the host budget allows
    placement: Placement | None = None
    refs: int = 0  # running requests
    waiters: int = 0  # requests that will want it: its host copy stays
    is_used: bool = False  # whether a request has run with it since it came to the device
    pinned: bool = False
    doomed: bool = False  # unload when the last user is gone
    error: PeftserveError | None = None
    retry_at: float = 0.0
    load_started: float = field(default_factory=time.monotonic)
    load_s: float | None = None

    def move(self, state: AdapterState) -> None:
        if state not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"adapter {self.ref.name}: no transition {self.state.name} -> {state.name}")
        self.state = state

    def residency(self) -> AdapterResidency:
        """The entry for people."""
        return AdapterResidency(
            digest=self.ref.digest,
            name=self.ref.name,
            tenant=self.ref.tenant,
            kind=self.ref.kind,
            state=self.state.value,
            refs=self.refs,
            pinned=self.pinned,
            host_bytes=self.host.host_bytes if self.host else 0,
            device_bytes=self.placement.device_bytes if self.placement else 0,
            load_s=self.load_s,
            error=self.error.message if self.error else None,
        )
