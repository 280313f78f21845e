"""Adapters as both front doors see them: the store's records and where the engine holds them, kept in step."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import anyio.to_thread

from peftserve.adapters.manifest import AdapterRecord
from peftserve.adapters.store import AdapterStore
from peftserve.adapters.upload import Upload
from peftserve.engine.messages import AdapterResidency
from peftserve.errors import AdapterNotFoundError
from peftserve.log import get_logger
from peftserve.metrics import Metrics
from peftserve.types import AdapterRef

logger = get_logger(__name__)
T = TypeVar("T")


class AdapterEngine(Protocol):
    """What adapters need of `engine.client.EngineClient`."""

    @property
    def residency(self) -> Mapping[str, AdapterResidency]: ...
    def prefetch(self, adapter: AdapterRef, *, pinned: bool = False) -> None: ...
    def unload(self, digest: str) -> None: ...


@dataclass(frozen=True, slots=True)
class AdapterView:
    """An adapter and its place in the engine's cache; `residency` is None while it lies in the store only."""

    record: AdapterRecord
    residency: AdapterResidency | None


class AdapterService:
    """Methods are tenant-scoped: a tenant never sees, names or changes another's adapters.

    The store works with files and a database, so its calls run in threads.
    """

    def __init__(self, *, store: AdapterStore, engine: AdapterEngine, metrics: Metrics, model_name: str) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._working: set[asyncio.Task[Any]] = set()
        self.model_name = model_name

    async def resolve(self, tenant: str, adapter_id: str, *, field: str = "adapter_id") -> AdapterRecord:
        """The version that `name` or `name@sha256:<digest>` means now. Never the base model in an adapter's stead."""
        try:
            return await anyio.to_thread.run_sync(self._store.resolve, tenant, adapter_id)
        except AdapterNotFoundError as error:
            message = f"{error.message}; the base model is {self.model_name!r}"
            raise AdapterNotFoundError(message, field=field, faults=error.faults) from error

    async def list(self, tenant: str) -> list[AdapterView]:
        """All adapters of the tenant, by name."""
        return [self._view(record) for record in await anyio.to_thread.run_sync(self._store.list, tenant)]

    async def get(self, tenant: str, name: str) -> AdapterView:
        """Raises `AdapterNotFoundError`."""
        return self._view(await anyio.to_thread.run_sync(self._store.get, tenant, name))

    @asynccontextmanager
    async def upload(self, tenant: str, name: str) -> AsyncIterator[Upload]:
        """An upload to write into and to `commit`; on leaving without that, nothing of it stays.

        Raises `InvalidRequestError` for a bad name, `ConflictError` over quota.
        """
        making = asyncio.ensure_future(anyio.to_thread.run_sync(self._store.new_upload, tenant, name))
        try:
            upload = await asyncio.shield(making)
        except asyncio.CancelledError:
            # The thread goes on, and nobody but us knows of what it makes.
            making.add_done_callback(_discard)
            raise
        try:
            yield upload
        finally:
            # Not in a thread: this must also run when the client has gone and the task is being cancelled.
            upload.discard()

    async def commit(self, tenant: str, name: str, upload: Upload) -> AdapterView:
        """Validate and publish. Raises `InvalidAdapterError` with all faults, `ConflictError` over quota.

        Requests in flight keep the version they began with; the engine drops it after them.
        """

        async def work() -> AdapterView:
            before = await self._find(tenant, name)
            record = await anyio.to_thread.run_sync(upload.commit)
            await self._prefetch(record)
            if before is not None and before.digest != record.digest:
                await self._unload(before)
            return self._view(record)

        return await self._to_the_end(work())

    async def delete(self, tenant: str, name: str) -> AdapterRecord:
        """Raises `AdapterNotFoundError`, `ConflictError` if pinned. Requests in flight end normally."""

        async def work() -> AdapterRecord:
            record = await anyio.to_thread.run_sync(self._store.delete, tenant, name)
            await self._unload(record)
            await self._unload_dead()
            self._metrics.forget_adapter(record.ref)
            return record

        return await self._to_the_end(work())

    async def set_pinned(self, tenant: str, name: str, pinned: bool) -> AdapterView:
        """A pinned adapter stays on the device. Raises `AdapterNotFoundError`, `ConflictError` over the pins' quota."""

        async def work() -> AdapterView:
            record = await anyio.to_thread.run_sync(self._store.set_pinned, tenant, name, pinned)
            await self._prefetch(record)
            return self._view(record)

        return await self._to_the_end(work())

    async def collect_garbage(self) -> Sequence[str]:
        """Delete the bytes that no name means any more and the engine does not hold; returns their digests."""
        await self._unload_dead()
        return await anyio.to_thread.run_sync(self._store.collect_garbage, set(self._engine.residency))

    async def restore(self, held_before: Sequence[AdapterRef]) -> None:
        """After a start of the engine: bring what the last one held to the host, if any name still means it, and all
        tenants' pinned adapters to the device."""
        dead = await anyio.to_thread.run_sync(self._store.dead, [ref.digest for ref in held_before])
        for ref in held_before:
            if ref.digest not in dead:
                self._engine.prefetch(ref)
        for record in await anyio.to_thread.run_sync(self._store.pinned):
            self._engine.prefetch(record.ref, pinned=True)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which goes on when the caller is cancelled: what the store has done, the engine must
        hear."""
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    def _view(self, record: AdapterRecord) -> AdapterView:
        return AdapterView(record, self._engine.residency.get(record.digest))

    async def _find(self, tenant: str, name: str) -> AdapterRecord | None:
        try:
            return await anyio.to_thread.run_sync(self._store.get, tenant, name)
        except AdapterNotFoundError:
            return None

    # The engine knows bytes, not names: what is done to one name must not undo another name's pin or use.

    async def _prefetch(self, record: AdapterRecord) -> None:
        pinned = await anyio.to_thread.run_sync(self._store.pinned)
        self._engine.prefetch(record.ref, pinned=any(other.digest == record.digest for other in pinned))

    async def _unload(self, record: AdapterRecord) -> None:
        named = await anyio.to_thread.run_sync(self._store.list, record.tenant)
        pinned = await anyio.to_thread.run_sync(self._store.pinned)
        if all(other.digest != record.digest for other in (*named, *pinned)):
            self._engine.unload(record.digest)

    async def _unload_dead(self) -> None:
        """Versions that no name means any more: those of a deleted name that were asked for by digest, say, or that
        lost a race with a later upload."""
        for digest in await anyio.to_thread.run_sync(self._store.dead, list(self._engine.residency)):
            self._engine.unload(digest)


def num_virtual_tokens(record: AdapterRecord) -> int:
    """Tokens of the context that the adapter's prefix takes; 0 for other kinds."""
    return int(record.details.get("num_virtual_tokens", 0))


def _discard(making: "asyncio.Future[Upload]") -> None:
    if making.exception() is None:
        making.result().discard()


def _log_failure(task: asyncio.Task[Any]) -> None:
    """Of work that nobody waits for any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("a change to an adapter failed after its client had gone", error=str(error))
