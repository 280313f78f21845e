"""The index of names and versions: who has which adapter under which name. SQLAlchemy Core, by default on SQLite (WAL).

A name's current version is its newest row in `versions`, so publishing is one insert and there is no pointer that could
be wrong. A blob is alive while a version points to it.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError

from peftserve.adapters.manifest import AdapterManifest, AdapterRecord
from peftserve.errors import ConfigurationError, ConflictError, UnavailableError
from peftserve.log import get_logger
from peftserve.types import AdapterKind

log = get_logger(__name__)

SCHEMA_VERSION = 1
CheckPins = Callable[[Collection[AdapterRecord]], None]
_BUSY_TIMEOUT_S = 30

_metadata = sa.MetaData()
_schema = sa.Table("schema_version", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_tenants = sa.Table(
    "tenants",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
)
_blobs = sa.Table(
    "blobs",
    _metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("base_model_name", sa.String),
    sa.Column("details", sa.JSON, nullable=False),
)
_names = sa.Table(
    "names",
    _metadata,
    sa.Column("tenant", sa.ForeignKey("tenants.name"), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("pinned", sa.Boolean, nullable=False),
)
_versions = sa.Table(
    "versions",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("digest", sa.ForeignKey("blobs.digest"), nullable=False, index=True),
    sa.Column("published_at", sa.Float, nullable=False),
    sa.ForeignKeyConstraint(["tenant", "name"], ["names.tenant", "names.name"], ondelete="CASCADE"),
    sa.Index("versions_of_name", "tenant", "name", "id"),
    sqlite_autoincrement=True,
)

_records = sa.select(
    _names.c.tenant,
    _names.c.name,
    _names.c.pinned,
    _versions.c.id,
    _versions.c.published_at,
    _blobs,
).select_from(
    _names.join(
        _versions, sa.and_(_versions.c.tenant == _names.c.tenant, _versions.c.name == _names.c.name)
    ).join(_blobs, _blobs.c.digest == _versions.c.digest)
)  # fmt: skip
_newest_id = (
    sa.select(sa.func.max(_versions.c.id))
    .where(_versions.c.tenant == _names.c.tenant, _versions.c.name == _names.c.name)
    .correlate(_names)
    .scalar_subquery()
)
_current = _records.where(_versions.c.id == _newest_id)
_pinned = _current.where(_names.c.pinned).order_by(_names.c.tenant, _names.c.name)
# Built once: this one runs for every request.
_current_of_name = _current.where(_names.c.tenant == sa.bindparam("tenant"), _names.c.name == sa.bindparam("name"))


class Index:
    """Thread-safe; every method is one transaction."""

    def __init__(self, url: str) -> None:
        """Open the database, creating its tables if need be. Raises `ConfigurationError` if a newer server made it."""
        self._engine = sa.create_engine(url, pool_size=8, max_overflow=64)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        try:
            with self._transaction(write=True) as connection:
                _metadata.create_all(connection)
                version = connection.scalar(sa.select(_schema.c.version))
                if version is None:
                    connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
        except DatabaseError as error:  # no database at all, a full or read-only disk
            self.close()
            raise ConfigurationError(
                f"data_dir: cannot open the adapter index: {error.orig}", field="data_dir"
            ) from error
        if version not in (None, SCHEMA_VERSION):
            raise ConfigurationError(
                f"the adapter index has schema version {version}, this server knows {SCHEMA_VERSION}; "
                "run the server version that made it, or start with another data_dir"
            )

    def close(self) -> None:
        self._engine.dispose()

    def publish(
        self,
        tenant: str,
        name: str,
        manifest: AdapterManifest,
        *,
        max_adapters: int,
        keep_versions: int,
        check_pins: CheckPins,
    ) -> AdapterRecord:
        """Make `manifest` the current version of the name; nothing changes if it is already.

        Versions older than the newest `keep_versions` are forgotten. Raises `ConflictError` over the quota, and what
        `check_pins` raises if the name is pinned.
        """
        with self._write() as connection:
            current = _current_version(connection, tenant, name)
            if current is not None and current.digest == manifest.digest:
                return current
            _lock_tenant(connection, tenant)
            if current is None:
                _check_quota(connection, tenant, max_adapters)
                connection.execute(_names.insert().values(tenant=tenant, name=name, pinned=False))
            if connection.scalar(sa.select(_blobs.c.digest).where(_blobs.c.digest == manifest.digest)) is None:
                connection.execute(
                    _blobs.insert().values(
                        digest=manifest.digest,
                        kind=manifest.kind.value,
                        size_bytes=manifest.size_bytes,
                        base_model_name=manifest.base_model_name,
                        details=manifest.details,
                    )
                )
            connection.execute(
                _versions.insert().values(tenant=tenant, name=name, digest=manifest.digest, published_at=time.time())
            )
            kept = (
                sa.select(_versions.c.id)
                .where(_versions.c.tenant == tenant, _versions.c.name == name)
                .order_by(_versions.c.id.desc())
                .limit(keep_versions)
            )
            connection.execute(
                _versions.delete().where(
                    _versions.c.tenant == tenant, _versions.c.name == name, _versions.c.id.not_in(kept)
                )
            )
            record = _records_of(connection, _current_of_name, {"tenant": tenant, "name": name})[0]
            if record.pinned:
                check_pins(_records_of(connection, _pinned))
            return record

    def check_quota(self, tenant: str, name: str, max_adapters: int) -> None:
        """Raises `ConflictError` if a new name would exceed the quota; existing names may always be replaced."""
        with self._read() as connection:
            if _current_version(connection, tenant, name) is None:
                _check_quota(connection, tenant, max_adapters)

    def get(self, tenant: str, name: str) -> AdapterRecord | None:
        """The current version."""
        with self._read() as connection:
            return _current_version(connection, tenant, name)

    def versions(self, tenant: str, name: str) -> list[AdapterRecord]:
        """The kept versions of a name, newest first."""
        with self._read() as connection:
            return _records_of(connection, _records.where(*_is(tenant, name)).order_by(_versions.c.id.desc()))

    def current(self, tenant: str) -> list[AdapterRecord]:
        """The current version of every name of a tenant, by name."""
        with self._read() as connection:
            return _records_of(connection, _current.where(_names.c.tenant == tenant).order_by(_names.c.name))

    def pinned(self) -> list[AdapterRecord]:
        """The current version of every pinned name, all tenants."""
        with self._read() as connection:
            return _records_of(connection, _pinned)

    def similar_names(self, tenant: str, name: str, limit: int = 500) -> Sequence[str]:
        """Some names of a tenant, those that begin like `name` first."""
        alike = sa.func.substr(_names.c.name, 1, 2) == name[:2]
        query = sa.select(_names.c.name).where(_names.c.tenant == tenant).order_by(alike.desc(), _names.c.name)
        with self._read() as connection:
            return connection.scalars(query.limit(limit)).all()

    def delete(self, tenant: str, name: str) -> AdapterRecord | None:
        """Forget a name and its versions; returns what it was. Raises `ConflictError` if it is pinned."""
        with self._write() as connection:
            record = _current_version(connection, tenant, name)
            if record is None:
                return None
            if record.pinned:
                raise ConflictError(f"adapter {name!r} is pinned; unpin it before deleting it", field="adapter_id")
            connection.execute(_names.delete().where(*_is(tenant, name)))
            return record

    def set_pinned(self, tenant: str, name: str, pinned: bool, check_pins: CheckPins) -> AdapterRecord | None:
        """Pin or unpin a name; returns its record, None if there is no such name.

        A new pin is undone if `check_pins`, which gets all that would be pinned, raises.
        """
        with self._write() as connection:
            before = _current_version(connection, tenant, name)
            connection.execute(_names.update().where(*_is(tenant, name)).values(pinned=pinned))
            if pinned and before is not None and not before.pinned:
                check_pins(_records_of(connection, _pinned))
            return _current_version(connection, tenant, name)

    def live_digests(self) -> set[str]:
        """The digests that some version points to."""
        with self._read() as connection:
            return set(connection.scalars(sa.select(_versions.c.digest).distinct()))

    def forget_blobs(self, keep: Collection[str]) -> None:
        """Drop what is known of blobs that no version points to, except `keep`."""
        with self._write() as connection:
            live = sa.select(_versions.c.digest)
            dead = connection.scalars(sa.select(_blobs.c.digest).where(_blobs.c.digest.not_in(live))).all()
            gone = [{"dead": digest} for digest in dead if digest not in keep]
            if gone:
                connection.execute(_blobs.delete().where(_blobs.c.digest == sa.bindparam("dead")), gone)

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with _available(), self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with _available(), self._transaction(write=True) as connection:
            yield connection

    def _transaction(self, *, write: bool) -> AbstractContextManager[sa.Connection]:
        return self._engine.execution_options(peftserve_write=write).begin()


@contextmanager
def _available() -> Iterator[None]:
    """A full disk or a database that is away is the operator's to mend, and the client's to wait for."""
    try:
        yield
    except OperationalError as error:
        log.error("the adapter index cannot be used", error=str(error.orig))
        full = "disk is full" in str(error.orig)
        what = "the server's adapter storage is full" if full else "the server's adapter index cannot be used now"
        raise UnavailableError(what, retry_after_s=60.0) from error


def _is(tenant: str, name: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return _names.c.tenant == tenant, _names.c.name == name


def _current_version(connection: sa.Connection, tenant: str, name: str) -> AdapterRecord | None:
    return next(iter(_records_of(connection, _current_of_name, {"tenant": tenant, "name": name})), None)


def _records_of(
    connection: sa.Connection, query: sa.Select[Any], parameters: Mapping[str, str] | None = None
) -> list[AdapterRecord]:
    return [
        AdapterRecord(
            tenant=row.tenant,
            name=row.name,
            kind=AdapterKind(row.kind),
            digest=row.digest,
            pinned=row.pinned,
            created_at=row.published_at,
            size_bytes=row.size_bytes,
            base_model_name=row.base_model_name,
            details=row.details,
        )
        for row in connection.execute(query, parameters)
    ]


def _lock_tenant(connection: sa.Connection, tenant: str) -> None:
    """Publishers of one tenant wait for each other, so that the quota holds (SQLite: all writers do anyway)."""
    try:
        with connection.begin_nested():
            connection.execute(_tenants.insert().values(name=tenant, created_at=time.time()))
    except IntegrityError:
        connection.execute(sa.select(_tenants.c.name).where(_tenants.c.name == tenant).with_for_update())


def _check_quota(connection: sa.Connection, tenant: str, max_adapters: int) -> None:
    count = connection.scalar(sa.select(sa.func.count()).select_from(_names).where(_names.c.tenant == tenant)) or 0
    if count >= max_adapters:
        raise ConflictError(
            f"tenant {tenant!r} has {count} adapters, the limit is {max_adapters} (max_adapters); delete one first",
            field="adapter_id",
        )


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # SQLAlchemy's recipe for SQLite: the driver must not begin transactions on its own.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that writes late would fail at once with SQLITE_BUSY instead of waiting.
    write = connection.get_execution_options().get("peftserve_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
