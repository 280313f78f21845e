"""The tiered adapter cache: disk -> host -> device, LRU over what nobody uses. Imports no torch.

The step thread owns all state here. Reading and parsing an adapter, and copying it to its place on the device, happen
on loader threads; their results are taken in by `poll`, so a step never waits for an adapter.

An adapter on the device keeps its host copy while the host's budget allows, so that evicting it costs nothing. On the
CPU both would lie in the same memory: there the weights move, and an eviction moves them back.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial

from peftserve.engine.adapter_entry import AdapterEntry, AdapterState
from peftserve.engine.adapter_memory import AdapterMemory, HostAdapter, Placement
from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.loader_pool import LoaderPool
from peftserve.engine.messages import AdapterResidency
from peftserve.errors import AdapterLoadError, PeftserveError
from peftserve.types import AdapterKind, AdapterRef


class AdapterCache:
    """Adapters by digest. `on_done` is called from a loader thread when `poll` has something to take in.

    A failed load is tried again after `retry_s`; one that finds no room in the host tier waits `starvation_s` at most
    before others that are waited for are dropped for it.
    """

    def __init__(
        self,
        memory: AdapterMemory,
        kv: KvPageManager,
        *,
        host_bytes: int,
        retry_s: float,
        starvation_s: float,
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
        self._starvation_s = starvation_s
        self._entries: OrderedDict[str, AdapterEntry] = OrderedDict()  # least recently used first
        self._placed: OrderedDict[str, AdapterEntry] = OrderedDict()  # those with a place on the device, likewise
        self._pins_to_place: dict[str, AdapterEntry] = {}  # pinned, on the host, and the device has had no room yet
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
        those that other requests wait for, if somebody has used them since they came.
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
        entry.is_used = True
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

    def is_kept_out(self, digest: str) -> bool:
        """Whether an adapter for which `acquire` found no room will find none while the pinned ones stay."""
        entry = self._entries[digest]
        host = entry.host
        if entry.state is not AdapterState.HOST or host is None:
            return False
        if host.kind is AdapterKind.PREFIX:
            pinned = [other for other in self._on_device(uses_pages=True) if other.pinned]
            return self._pages_needed(host) + _count_pages(pinned) > self._kv.num_pages
        others = self._on_device(uses_pages=False)
        pinned = [other for other in others if other.pinned]
        # Though there is room enough, it may lie between them in pieces that are too small.
        return len(pinned) == len(others) or not self._fits_beside(pinned, host)

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
            self._place_pinned(entry)
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
        for entry in list(self._pins_to_place.values()):
            self._place_pinned(entry)
        self._start_loads()
        return changed

    def reclaim_pages(self) -> bool:
        """Evict one unused prefix adapter, so that its KV pages are free; False when there is none."""
        for entry in self._on_device(uses_pages=True):
            if _is_idle(entry):
                self._evict(entry)
                return True
        return False

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
                # All of it is waited for. Room comes as those requests start, unless as many come again.
                if time.monotonic() - self._backlog[0].load_started > self._starvation_s:
                    self._send_back()
                return
            entry = self._backlog.popleft()
            self._pool.submit(entry, partial(self._memory.load, entry.ref))

    def _loaded(self, entry: AdapterEntry, host: HostAdapter) -> None:
        self.loads += 1
        entry.load_s = time.monotonic() - entry.load_started
        if reason := self._never_fits(host):
            self._failed(entry, AdapterLoadError(reason))
            return
        self._keep_host(entry, host)
        entry.num_virtual_tokens = host.num_virtual_tokens
        entry.move(AdapterState.HOST)
        if entry.pinned:
            self._place_pinned(entry)

    def _never_fits(self, host: HostAdapter) -> str | None:
        if host.host_bytes > self._host_budget:
            return f"it needs {host.host_bytes} bytes of host memory, adapter_host_bytes is {self._host_budget}"
        if host.kind is AdapterKind.PREFIX:
            pages = self._pages_needed(host)
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
        while (placement := self._reserve(host)) is None:
            if not self._make_room(host, urgent=urgent):
                return
        entry.placement = placement
        entry.is_used = False
        self._placed[entry.ref.digest] = entry
        self.device_bytes_used += placement.device_bytes
        entry.move(AdapterState.LOADING)

        def copy() -> Placement:
            self._memory.copy(host, placement)
            return placement

        self._pool.submit(entry, copy)

    def _place_pinned(self, entry: AdapterEntry) -> None:
        """Now if there is room, else as soon as there is."""
        self._pins_to_place.pop(entry.ref.digest, None)
        if entry.pinned and entry.state is AdapterState.HOST:
            self._place(entry, urgent=False)
            if entry.state is AdapterState.HOST:
                self._pins_to_place[entry.ref.digest] = entry

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

    def _make_room(self, host: HostAdapter, *, urgent: bool) -> bool:
        """Evict one adapter for `host`'s sake; False when that would not help, however many went."""
        is_prefix = host.kind is AdapterKind.PREFIX
        others = self._on_device(uses_pages=is_prefix)
        able: list[AdapterEntry] = []
        staying: list[AdapterEntry] = []
        for entry in others:
            may_go = _is_idle(entry) and (not entry.waiters or (urgent and entry.is_used))
            (able if may_go else staying).append(entry)
        if is_prefix:
            if self._kv.num_available + _count_pages(able) < self._kv.pages_for(host.num_virtual_tokens):
                return False
        else:
            if not self._fits_beside(staying, host):
                return False
            if not self._memory.fits(host, taken_slots=_count(others, host.kind)):
                able = [entry for entry in able if entry.ref.kind is host.kind]  # only they have what is missing: slots
        if not able:
            return False
        self._evict(able[0])
        return True

    def _fits_beside(self, others: Sequence[AdapterEntry], host: HostAdapter) -> bool:
        """Whether a LoRA or bottleneck adapter could be placed with only these there, if room were in one piece."""
        taken = sum(entry.placement.device_bytes for entry in others if entry.placement)
        return self._memory.fits(host, taken_bytes=taken, taken_slots=_count(others, host.kind))

    def _on_device(self, *, uses_pages: bool) -> list[AdapterEntry]:
        """What has a place there, or will have: prefixes, or all others. Least recently used first."""
        return [entry for entry in self._placed.values() if uses_pages == (entry.ref.kind is AdapterKind.PREFIX)]

    def _pages_needed(self, host: HostAdapter) -> int:
        """KV pages of a prefix, and one more, so that a request has at least a page of its own."""
        return self._kv.pages_for(host.num_virtual_tokens) + 1

    def _evict(self, entry: AdapterEntry) -> None:
        self.evictions_device += 1
        self._leave_device(entry)
        self._trim_host()  # what it had lent is on the host again

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
        """Drop host copies, least recently used first, until the budget holds: first those also on the device, last of
        these the ones that are waited for."""
        excess = self.host_bytes_used - self._host_budget
        if excess <= 0:
            return
        copies = [entry for entry in self._placed.values() if entry.state is AdapterState.DEVICE]
        only = [entry for entry in self._entries.values() if entry.state is AdapterState.HOST and not entry.pinned]
        free = [entry for entry in copies + only if not entry.waiters]
        for entry in free + [entry for entry in copies if entry.waiters]:
            if excess <= 0:
                break
            if entry.host is not None and not entry.host.lent:
                excess -= entry.host.host_bytes
                self._drop_host(entry)
                if entry.placement is None:
                    self._drop(entry)

    def _send_back(self) -> None:
        """Drop the host copy that was used least recently, of those that are waited for: it is loaded anew in turn."""
        for entry in self._entries.values():
            if entry.state is AdapterState.HOST and entry.host is not None and not entry.pinned:
                self._drop_host(entry)
                entry.move(AdapterState.LOADING)
                self._queue_load(entry)
                return

    def _drop_host(self, entry: AdapterEntry) -> None:
        self.evictions_host += 1
        self._keep_host(entry, None)
        self._touch(entry)

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


def _is_idle(entry: AdapterEntry) -> bool:
    """On the device, and nobody would miss it there right now."""
    return entry.state is AdapterState.DEVICE and not entry.refs and not entry.pinned


def _count_pages(prefixes: Sequence[AdapterEntry]) -> int:
    return sum(len(entry.placement.pages) for entry in prefixes if entry.placement)


def _count(entries: Sequence[AdapterEntry], kind: AdapterKind) -> int:
    return sum(entry.ref.kind is kind for entry in entries)
