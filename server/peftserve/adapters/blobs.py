"""Adapter files by digest: `<root>/blobs/<first two digits>/<digest>/{adapter_config.json, adapter_model.safetensors}`.

A blob's folder appears with one rename when all of its bytes are on the disk, and never changes afterwards.
"""

import contextlib
import hashlib
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftserve.adapters import manifest, safetensors
from peftserve.adapters.safetensors import TensorView
from peftserve.errors import AdapterNotFoundError, InvalidAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_DIGEST = re.compile(r"[0-9a-f]{64}")


def adapters_root(data_dir: Path) -> Path:
    """Where the store of a data folder lies."""
    return data_dir.expanduser() / "adapters"


def is_digest(text: str) -> bool:
    """Whether it is a sha256 in lower-case hex."""
    return _DIGEST.fullmatch(text) is not None


def blob_dir(root: Path, digest: str) -> Path:
    return root / "blobs" / digest[:2] / digest


def staging_dir(root: Path) -> Path:
    return root / "staging"


def read_adapter(root: Path, digest: str) -> tuple[dict[str, Any], dict[str, TensorView]]:
    """An adapter's config and tensors. The tensors are views of a memory map, which lives as long as they do.

    The bytes are hashed first. Raises `AdapterNotFoundError` if there is no such blob, `InvalidAdapterError` if it is
    corrupt on disk.
    """
    if not is_digest(digest):
        raise AdapterNotFoundError("an adapter digest is 64 hexadecimal digits")
    folder = blob_dir(root, digest)
    try:
        config_bytes = (folder / CONFIG_FILE).read_bytes()
        weights = map_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise AdapterNotFoundError(f"no adapter with digest sha256:{digest} is stored") from None
    found = manifest.digest_of(hashlib.sha256(config_bytes).hexdigest(), hashlib.sha256(weights).hexdigest())
    if found != digest:
        raise InvalidAdapterError(
            f"adapter sha256:{digest} is corrupt on disk: its files now have the digest {found}; upload it again"
        )
    return manifest.read_config(config_bytes), safetensors.read(weights)


def map_file(path: Path) -> memoryview:
    """A file's bytes, read-only, mapped; empty files too."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def install(folder: Path, root: Path, digest: str) -> None:
    """Move a finished folder to its place among the blobs; keeps what is there already if that is sound.

    The files must be on the disk (`sync`). The caller keeps the garbage collector out.
    """
    place = blob_dir(root, digest)
    if place.exists():
        try:
            read_adapter(root, digest)
        except (InvalidAdapterError, AdapterNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                remove(place, root)
        else:
            return
    place.parent.mkdir(parents=True, exist_ok=True)
    sync(place.parent.parent)
    try:
        folder.rename(place)
    except OSError:
        # Another upload of the same bytes was quicker.
        if not place.exists():
            raise
    sync(place.parent)


def stored_digests(root: Path) -> Iterator[str]:
    """The digests of all blobs on the disk."""
    for folder in sorted((root / "blobs").glob("??/*")):
        if is_digest(folder.name):
            yield folder.name


def remove(folder: Path, root: Path) -> None:
    """Delete a folder so that nobody ever sees half of it: first out of the way, then for good."""
    trash = staging_dir(root) / f"trash-{uuid.uuid4().hex}"
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
