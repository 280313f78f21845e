"""The adapter store: names and versions in the index, bytes in content-addressed blobs, both crash-safe.

Order of a publication: bytes to staging and to the disk, validation, rename into `blobs/`, one index transaction. A
crash before the transaction leaves the old version and perhaps a blob that nothing points to, which the next start
removes; after it, the new version.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TypeAlias

from peftserve.adapters import blobs, locks, names
from peftserve.adapters.device_quota import DeviceQuota
from peftserve.adapters.index import Index
from peftserve.adapters.manifest import AdapterManifest, AdapterRecord
from peftserve.adapters.upload import Upload
from peftserve.config import LimitsConfig
from peftserve.errors import AdapterNotFoundError, ConfigurationError
from peftserve.model.spec import ModelSpec

# Named here because `AdapterStore.list` hides the builtin inside the class.
Records: TypeAlias = list[AdapterRecord]
Digests: TypeAlias = list[str]

KEEP_VERSIONS = 3


class AdapterStore:
    """All methods block and may be called from any thread; several processes may share a root."""

    def __init__(
        self,
        root: Path,
        spec: ModelSpec,
        *,
        limits: LimitsConfig | None = None,
        max_rank: int = 128,
        reserved_names: Collection[str] = (),
        index_url: str | None = None,
        keep_versions: int = KEEP_VERSIONS,
    ) -> None:
        """Open the store under `root` (see `blobs.adapters_root`), creating it if need be, and clean up after a crash.

        `spec` is the base that uploads are validated against, `max_rank` bounds LoRA ranks and bottleneck widths,
        `reserved_names` may not be given to adapters. `index_url` is an SQLAlchemy URL; the default is a SQLite file
        under `root`. The newest `keep_versions` of each name can be asked for by digest. Raises
        `ConfigurationError` if `root` or the index cannot be used.
        """
        self.root = root
        self._spec = spec
        self._limits = limits or LimitsConfig()
        self._max_rank = max_rank
        self._reserved = frozenset(reserved_names)
        self._keep_versions = keep_versions
        self._quota: DeviceQuota | None = None
        try:
            for folder in (root / "blobs", blobs.staging_dir(root)):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(f"data_dir: cannot write to {root}: {error.strerror}", field="data_dir") from error
        self._lock = root / "lock"
        self._index = Index(index_url or f"sqlite:///{root / 'index.sqlite3'}")
        self._sweep()

    def limit_to(self, quota: DeviceQuota) -> None:
        """Bound what adapters that come from now on may hold by themselves, and those that are pinned all together; at
        first nothing does."""
        self._quota = quota

    def close(self) -> None:
        """Close the index; the store must not be used any more."""
        self._index.close()

    def new_upload(self, tenant: str, name: str) -> Upload:
        """Begin to upload a version of `name`. Nothing is visible before `Upload.commit`; use it as a context manager.

        Raises `InvalidRequestError` for a bad or reserved name and `ConflictError` over the tenant's quota.
        """
        names.check_name(name, self._reserved)
        self._index.check_quota(tenant, name, self._limits.max_adapters)
        with locks.hold(self._lock, exclusive=False):
            return Upload(
                self.root,
                lambda folder, manifest: self._publish(tenant, name, folder, manifest),
                spec=self._spec,
                max_rank=self._max_rank,
                max_bytes=self._limits.max_adapter_bytes,
            )

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """The current version of a name; raises `AdapterNotFoundError` with similar names."""
        record = self._index.get(tenant, name)
        if record is None:
            raise self._not_found(tenant, name)
        return record

    def resolve(self, tenant: str, reference: str) -> AdapterRecord:
        """The version meant by `name` (the current one) or `name@sha256:<digest>`; raises `AdapterNotFoundError`."""
        name, digest = names.split_reference(reference)
        if digest is None:
            return self.get(tenant, name)
        versions = self.history(tenant, name)
        for version in versions:
            if version.digest == digest:
                return version
        kept = ", ".join(f"sha256:{version.digest}" for version in versions)
        raise AdapterNotFoundError(
            f"adapter {name!r} has no version sha256:{digest}; kept are {kept}", field="adapter_id"
        )

    def history(self, tenant: str, name: str) -> Records:
        """The kept versions of a name, newest (current) first; raises `AdapterNotFoundError`."""
        versions = self._index.versions(tenant, name)
        if not versions:
            raise self._not_found(tenant, name)
        return versions

    def list(self, tenant: str) -> Records:
        """The current version of each of a tenant's adapters, by name."""
        return self._index.current(tenant)

    def pinned(self) -> Records:
        """The current versions of all pinned adapters of all tenants."""
        return self._index.pinned()

    def delete(self, tenant: str, name: str) -> AdapterRecord:
        """Remove a name with all its versions; its bytes go with the next `collect_garbage`.

        Returns what was the current version. Raises `AdapterNotFoundError`, or `ConflictError` if it is pinned.
        """
        record = self._index.delete(tenant, name)
        if record is None:
            raise self._not_found(tenant, name)
        return record

    def set_pinned(self, tenant: str, name: str, pinned: bool) -> AdapterRecord:
        """Pin or unpin a name; a pin stays with the name when a new version replaces the old.

        Raises `AdapterNotFoundError`, and `ConflictError` for a pin over the quota.
        """
        record = self._index.set_pinned(tenant, name, pinned, self._check_pins)
        if record is None:
            raise self._not_found(tenant, name)
        return record

    def is_live(self, digest: str) -> bool:
        """Whether any version of any tenant's adapters still points to these bytes."""
        return not self.dead([digest])

    def dead(self, digests: Iterable[str]) -> Digests:
        """Those that no version of any tenant's adapters points to any more."""
        live = self._index.live_digests()
        return [digest for digest in digests if digest not in live]

    def collect_garbage(self, in_use: Collection[str] = ()) -> Digests:
        """Delete the bytes that no version points to, except digests `in_use`; returns the digests deleted.

        Waits for publications under way, and they for it.
        """
        with locks.hold(self._lock, exclusive=True):
            keep = self._index.live_digests().union(in_use)
            dead = [digest for digest in blobs.stored_digests(self.root) if digest not in keep]
            self._index.forget_blobs(in_use)
            for digest in dead:
                blobs.remove(blobs.blob_dir(self.root, digest), self.root)
        return dead

    def _publish(self, tenant: str, name: str, folder: Path, manifest: AdapterManifest) -> AdapterRecord:
        if self._quota is not None:
            self._quota.check_one(manifest.kind, manifest.details)
        with locks.hold(self._lock, exclusive=False):
            blobs.install(folder, self.root, manifest.digest)
            return self._index.publish(
                tenant,
                name,
                manifest,
                max_adapters=self._limits.max_adapters,
                keep_versions=self._keep_versions,
                check_pins=self._check_pins,
            )

    def _check_pins(self, pinned: Collection[AdapterRecord]) -> None:
        if self._quota is not None:
            self._quota.check(pinned)

    def _sweep(self) -> None:
        """Remove what uploads of dead processes left behind."""
        with locks.hold(self._lock, exclusive=True):
            for folder in blobs.staging_dir(self.root).iterdir():
                # Another process may be discarding it just now.
                with contextlib.suppress(FileNotFoundError):
                    if not locks.is_claimed(folder):
                        shutil.rmtree(folder, ignore_errors=True)
        self.collect_garbage()

    def _not_found(self, tenant: str, name: str) -> AdapterNotFoundError:
        return names.not_found(name, self._index.similar_names(tenant, name))
