"""One upload: bytes stream into a staging folder, capped and hashed on the way; `commit` validates and publishes."""

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from peftserve.adapters import blobs, locks, safetensors
from peftserve.adapters import manifest as manifests
from peftserve.adapters.faults import refusal
from peftserve.adapters.manifest import AdapterManifest, AdapterRecord
from peftserve.errors import ConflictError, PayloadTooLargeError, UnavailableError
from peftserve.model.spec import ModelSpec


class Upload:
    """Made by `AdapterStore.new_upload`. Config and weights may come in any order and in any number of chunks.

    Leaving it as a context manager discards what was not committed. One thread at a time.
    """

    def __init__(
        self,
        root: Path,
        publish: Callable[[Path, AdapterManifest], AdapterRecord],
        *,
        spec: ModelSpec,
        max_rank: int,
        max_bytes: int,
    ) -> None:
        self._publish = publish
        self._spec = spec
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._config = bytearray()
        self._weights_bytes = 0
        self._weights_hash = hashlib.sha256()
        self._folder = blobs.staging_dir(root) / uuid.uuid4().hex
        self._folder.mkdir(mode=0o700)
        self._claim = locks.claim(self._folder)
        self._weights = (self._folder / blobs.WEIGHTS_FILE).open("wb")
        self._open = True
        # A client may go away while a thread writes or publishes; only one of them ends the upload.
        self._lock = threading.Lock()

    @property
    def received_bytes(self) -> int:
        return len(self._config) + self._weights_bytes

    def write_config(self, chunk: bytes) -> None:
        """Add to `adapter_config.json`; raises `PayloadTooLargeError`."""
        self._check_open()
        if len(self._config) + len(chunk) > manifests.MAX_CONFIG_BYTES:
            raise PayloadTooLargeError(
                f"the adapter config is larger than the limit of {manifests.MAX_CONFIG_BYTES} bytes", field="config"
            )
        self._check_size(len(chunk))
        self._config += chunk

    def write_weights(self, chunk: bytes) -> None:
        """Add to the weights; raises `PayloadTooLargeError`."""
        with self._lock:
            self._check_open()
            self._check_size(len(chunk))
            with _storage():
                self._weights.write(chunk)
            self._weights_hash.update(chunk)
            self._weights_bytes += len(chunk)

    def commit(self) -> AdapterRecord:
        """Validate the adapter whole and publish it; returns when it is on the disk. The same again is no change.

        Raises `InvalidAdapterError` with all faults, `ConflictError` over the quota. The upload is over in any case.
        """
        with self._lock:
            self._check_open()
            self._open = False  # from here on `discard` leaves the clearing up to us
        try:
            with _storage():
                return self._publish(self._folder, self._validate())
        finally:
            self._clear()

    def discard(self) -> None:
        """Give the upload up; does nothing after `commit` or a second time."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._clear()

    def _clear(self) -> None:
        self._weights.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._claim)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _validate(self) -> AdapterManifest:
        if not self._config:
            raise refusal("the config (adapter_config.json) is missing")
        config = manifests.read_config(bytes(self._config))
        canonical = manifests.canonical_config(config)
        self._weights.flush()
        os.fsync(self._weights.fileno())
        (self._folder / blobs.CONFIG_FILE).write_bytes(canonical)
        blobs.sync(self._folder / blobs.CONFIG_FILE)
        blobs.sync(self._folder)
        weights = blobs.map_file(self._folder / blobs.WEIGHTS_FILE)
        return manifests.inspect(
            config,
            safetensors.read(weights),
            self._spec,
            max_rank=self._max_rank,
            digest=manifests.digest_of(hashlib.sha256(canonical).hexdigest(), self._weights_hash.hexdigest()),
            size_bytes=len(canonical) + self._weights_bytes,
        )

    def _check_open(self) -> None:
        if not self._open:
            raise ConflictError("this upload is over; begin a new one")

    def _check_size(self, more: int) -> None:
        if self.received_bytes + more > self._max_bytes:
            raise PayloadTooLargeError(
                f"the adapter is larger than the limit of {self._max_bytes} bytes (max_adapter_bytes)", field="weights"
            )


@contextlib.contextmanager
def _storage() -> Iterator[None]:
    """A full disk is the operator's to mend, and the client's to wait for."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnavailableError("the server's adapter storage is full", retry_after_s=60.0) from error
        raise
