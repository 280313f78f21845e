"""The tiered adapter cache: disk -> host -> device, LRU over what nobody uses. Imports no torch.

The step thread owns all state here. Reading and parsing an adapter, and copying it to its place on the device, happen
on loader threads; their results are taken in by `poll`, so a step never waits for an adapter.

An adapter on the device keeps its host copy while the host's budget allows, so that evicting it costs nothing. On the
CPU both would lie in the same memory: there the weights move, and an eviction moves them back.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from itertools import chain

from peftserve.engine.adapter_entry import AdapterEntry, AdapterState
from peftserve.engine.adapter_memory import AdapterMemory, HostAdapter, Placement
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.loader_pool import LoaderPool
from peftserve.engine.messages import AdapterResidency
from peftserve.errors import AdapterLoadError, PeftserveError
from peftserve.types import AdapterKind, AdapterRef


class AdapterCache:
    """Adapters by digest. `on_done` is called from a loader thread when `poll` has something to take in."""

    def __init__(
        self,
        memory: AdapterMemory,
        kv: KvPageManager,
        *,
        host_bytes: int,
        retry_s: float,
        on_done: Callable[[], None] = lambda: None,
        threads: int = 2,
    ) -> None:
        self.evictions_device = 0
        self.evictions_host = 0
        self.loads = 0
        self.load_failures = 0
        self.host_bytes_used = 0
        self.device_bytes_used = 0
        self._memory = memory
        self._kv = kv
        self._host_budget = host_bytes
        self._retry_s = retry_s
        self._entries: OrderedDict[str, AdapterEntry] = OrderedDict()  # least recently used first
        self._placed: OrderedDict[str, AdapterEntry] = OrderedDict()  # those with a place on the device, likewise
        self._changed: dict[str, None] = {}  # digests whose residency has changed since `take_changes`
        self._backlog: deque[AdapterEntry] = deque()  # loads that wait for a thread, or for room in the host tier
        self._pool: LoaderPool[AdapterEntry, HostAdapter | Placement] = LoaderPool(threads, on_done)

    # -- requests come and go ------------------------------------------------------------------------------------

    def want(self, ref: AdapterRef) -> None:
        """A request will need `ref`: start bringing it to the host unless it is there. Balanced by `unwant`."""
        entry = self._fetch(ref)
        entry.waiters += 1

    def unwant(self, digest: str) -> None:
        """The request that wanted it has started, or is gone."""
        entry = self._entries[digest]
        entry.waiters -= 1
        self._settle(entry)

    def acquire(self, digest: str, *, urgent: bool = False) -> int | None:
        """Take a reference to the adapter on the device; returns its slot, or None when it is not there yet.

        None starts its way to the device if there is room, or if unused adapters can be evicted. `urgent` also evicts
        those that other requests wait for.
        """
        entry = self._entries[digest]
        self._entries.move_to_end(digest)
        if entry.placement:
            self._placed.move_to_end(digest)
        if entry.state is AdapterState.HOST:
            self._place(entry, urgent=urgent)
        if entry.state is not AdapterState.DEVICE or entry.placement is None:
            return None
        entry.refs += 1
        self._touch(entry)
        return entry.placement.slot

    def release(self, digest: str) -> None:
        """Give a reference back."""
        entry = self._entries[digest]
        if entry.refs <= 0:
            raise RuntimeError(f"adapter {entry.ref.name} released more often than acquired")
        entry.refs -= 1
        self._touch(entry)
        self._settle(entry)

    # -- looking -------------------------------------------------------------------------------------------------

    def state(self, digest: str) -> AdapterState | None:
        """None when absent."""
        entry = self._entries.get(digest)
        return entry.state if entry else None

    def error(self, digest: str) -> PeftserveError | None:
        """Why the last load failed, while a new try is not due."""
        entry = self._entries.get(digest)
        if entry is None or entry.state is not AdapterState.FAILED:
            return None
        return entry.error

    def is_on_host(self, digest: str) -> bool:
        """Whether a request for it may wait for a place now (it is on the host or beyond)."""
        entry = self._entries.get(digest)
        return entry is not None and (entry.host is not None or entry.placement is not None)

    @property
    def pages_in_transit(self) -> bool:
        """Whether KV pages are held by a prefix that is still being copied: they can be reclaimed soon."""
        return any(
            entry.state is AdapterState.LOADING and entry.placement and entry.placement.pages
            for entry in self._placed.values()
        )

    def num_virtual_tokens(self, digest: str) -> int:
        """Prefix length; known once the adapter has been on the host."""
        entry = self._entries[digest]
        if entry.num_virtual_tokens is None:
            raise RuntimeError(f"adapter {entry.ref.name} has not been loaded yet")
        return entry.num_virtual_tokens

    def prefix_pages(self, digest: str) -> tuple[int, ...]:
        """The pinned KV pages of an acquired prefix adapter; empty for other kinds."""
        placement = self._entries[digest].placement
        return placement.pages if placement else ()

    def residency(self) -> list[AdapterResidency]:
        """Every adapter here, for people."""
        return [entry.residency() for entry in self._entries.values()]

    def take_changes(self) -> tuple[list[AdapterResidency], list[str]]:
        """Adapters whose residency has changed since the last call, and digests of those that are gone."""
        changed, self._changed = self._changed, {}
        here = [self._entries[digest].residency() for digest in changed if digest in self._entries]
        return here, [digest for digest in changed if digest not in self._entries]

    # -- moving --------------------------------------------------------------------------------------------------

    def prefetch(self, ref: AdapterRef, *, pinned: bool) -> None:
        """Bring `ref` to the host; `pinned` also to the device, to stay there. `pinned=False` unpins."""
        entry = self._fetch(ref)
        entry.pinned = pinned
        entry.doomed = False
        self._touch(entry)
        if pinned and entry.state is AdapterState.HOST:
            self._place(entry, urgent=False)
        self._settle(entry)

    def unload(self, digest: str) -> None:
        """Drop the adapter from all tiers as soon as nobody uses it."""
        if entry := self._entries.get(digest):
            entry.doomed = True
            entry.pinned = False
            self._settle(entry)

    def poll(self) -> list[str]:
        """Take in what the loader threads finished; returns the digests that changed."""
        changed = []
        for entry, outcome in self._pool.poll():
            changed.append(entry.ref.digest)
            self._touch(entry)
            if isinstance(outcome, HostAdapter):
                self._loaded(entry, outcome)
            elif isinstance(outcome, Placement):
                self._placed_on_device(entry)
            else:
                self._failed(entry, outcome)
            self._settle(entry)
        if changed:
            self._trim_host()
        self._start_loads()
        return changed

    def reclaim_pages(self) -> bool:
        """Evict one unused prefix adapter, so that its KV pages are free; False when there is none."""
        return self._evict_device(lambda entry: bool(entry.placement and entry.placement.pages), urgent=True)

    def close(self) -> None:
        """Stop the loader threads."""
        self._pool.close()

    def _fetch(self, ref: AdapterRef) -> AdapterEntry:
        entry = self._entries.get(ref.digest)
        if entry is None:
            entry = self._entries[ref.digest] = AdapterEntry(ref)
            self._queue_load(entry)
        elif entry.state is AdapterState.FAILED and time.monotonic() >= entry.retry_at:
            entry.move(AdapterState.LOADING)
            self._queue_load(entry)
        self._entries.move_to_end(ref.digest)
        return entry

    def _queue_load(self, entry: AdapterEntry) -> None:
        entry.load_started = time.monotonic()
        entry.error = None
        self._touch(entry)
        self._backlog.append(entry)
        self._start_loads()

    def _start_loads(self) -> None:
        """Start queued loads while threads are idle and the host tier has room, or can make some."""
        while self._backlog and self._pool.in_flight < self._pool.threads:
            self._trim_host()
            if self.host_bytes_used > self._host_budget:
                return  # all of it is waited for; room comes as those requests start
            entry = self._backlog.popleft()
            self._pool.submit(entry, partial(self._memory.load, entry.ref))

    def _loaded(self, entry: AdapterEntry, host: HostAdapter) -> None:
        self.loads += 1
        entry.load_s = time.monotonic() - entry.load_started
        if reason := self._never_fits(host):
            self._failed(entry, AdapterLoadError(f"adapter {entry.ref.name} cannot be served: {reason}"))
            return
        self._keep_host(entry, host)
        entry.num_virtual_tokens = host.num_virtual_tokens
        entry.move(AdapterState.HOST)
        if entry.pinned:
            self._place(entry, urgent=False)

    def _never_fits(self, host: HostAdapter) -> str | None:
        if host.host_bytes > self._host_budget:
            return f"it needs {host.host_bytes} bytes of host memory, adapter_host_bytes is {self._host_budget}"
        if host.kind is AdapterKind.PREFIX:
            # One page more, so that a request has at least a page of its own.
            pages = self._kv.pages_for(host.num_virtual_tokens) + 1
            if pages > self._kv.num_pages:
                return f"its prefix needs {pages} KV pages, kv_cache_bytes holds {self._kv.num_pages}"
        elif not self._memory.fits(host):
            return "its weights exceed adapter_device_bytes"
        return None

    def _failed(self, entry: AdapterEntry, error: PeftserveError) -> None:
        self.load_failures += 1
        if entry.placement:
            self._give_back(entry)
        self._keep_host(entry, None)
        entry.error = error
        entry.retry_at = time.monotonic() + self._retry_s
        entry.move(AdapterState.FAILED)

    def _place(self, entry: AdapterEntry, *, urgent: bool) -> None:
        """HOST -> on its way to the device, evicting unused adapters for room; stays HOST when there is none."""
        host = entry.host
        if host is None:
            raise RuntimeError(f"adapter {entry.ref.name} has no host copy")
        uses_pages = host.kind is AdapterKind.PREFIX
        while (placement := self._reserve(host)) is None:
            if not self._evict_device(lambda e: uses_pages == bool(e.placement and e.placement.pages), urgent=urgent):
                return
        entry.placement = placement
        self._placed[entry.ref.digest] = entry
        self.device_bytes_used += placement.device_bytes
        entry.move(AdapterState.LOADING)

        def copy() -> Placement:
            self._memory.copy(host, placement)
            return placement

        self._pool.submit(entry, copy)

    def _placed_on_device(self, entry: AdapterEntry) -> None:
        if entry.host is not None:
            self._keep_host(entry, self._memory.lend(entry.host))
        entry.move(AdapterState.DEVICE)

    def _reserve(self, host: HostAdapter) -> Placement | None:
        if host.kind is not AdapterKind.PREFIX:
            return self._memory.reserve(host)
        pages = self._kv.allocate(self._kv.pages_for(host.num_virtual_tokens))
        return None if pages is None else Placement(pages=tuple(pages))

    def _give_back(self, entry: AdapterEntry) -> None:
        placement = entry.placement
        if placement is None:
            raise RuntimeError(f"adapter {entry.ref.name} is not placed")
        if placement.pages:
            self._kv.release(placement.pages)
        else:
            self._memory.release(placement, entry.ref.kind)
        entry.placement = None
        del self._placed[entry.ref.digest]
        self.device_bytes_used -= placement.device_bytes

    def _evict_device(self, wanted: Callable[[AdapterEntry], bool], *, urgent: bool) -> bool:
        for entry in self._placed.values():
            idle = entry.state is AdapterState.DEVICE and not entry.refs and not entry.pinned
            if idle and wanted(entry) and (urgent or not entry.waiters):
                self.evictions_device += 1
                self._leave_device(entry)
                return True
        return False

    def _leave_device(self, entry: AdapterEntry) -> None:
        if entry.host is not None and entry.host.lent and entry.placement is not None:
            self._keep_host(entry, self._memory.take_back(entry.host, entry.placement))
        self._give_back(entry)
        self._touch(entry)
        if entry.host is not None:
            entry.move(AdapterState.HOST)
        elif entry.waiters:
            # Its host copy had to make room meanwhile, and somebody still waits for it.
            entry.move(AdapterState.HOST)
            entry.move(AdapterState.LOADING)
            self._queue_load(entry)
        else:
            self._drop(entry)

    def _trim_host(self) -> None:
        """Drop host copies, least recently used first, until the budget holds: first those also on the device."""
        excess = self.host_bytes_used - self._host_budget
        if excess <= 0:
            return
        copies = [entry for entry in self._placed.values() if entry.state is AdapterState.DEVICE]
        only = (entry for entry in self._entries.values() if entry.state is AdapterState.HOST and not entry.pinned)
        dropped = []
        for entry in chain(copies, only):
            if excess <= 0:
                break
            if entry.host is not None and not entry.host.lent and not entry.waiters:
                excess -= entry.host.host_bytes
                dropped.append(entry)
        for entry in dropped:
            self.evictions_host += 1
            self._keep_host(entry, None)
            self._touch(entry)
            if entry.placement is None:
                self._drop(entry)

    def _keep_host(self, entry: AdapterEntry, host: HostAdapter | None) -> None:
        """Set the entry's host copy."""
        self.host_bytes_used += (host.host_bytes if host else 0) - (entry.host.host_bytes if entry.host else 0)
        entry.host = host

    def _touch(self, entry: AdapterEntry) -> None:
        self._changed[entry.ref.digest] = None

    def _drop(self, entry: AdapterEntry) -> None:
        """The entry leaves all tiers."""
        self._keep_host(entry, None)
        self._touch(entry)
        del self._entries[entry.ref.digest]

    def _settle(self, entry: AdapterEntry) -> None:
        """Finish an unload whose last user is gone."""
        if not entry.doomed or entry.refs or entry.waiters or entry.state is AdapterState.LOADING:
            return
        if entry.placement:
            self._give_back(entry)
        self._drop(entry)
