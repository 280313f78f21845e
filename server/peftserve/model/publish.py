"""Folders that appear whole or not at all: written aside, synced, renamed; one process at a time."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def publish_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, made by `write(temporary folder)` unless it exists already.

    Other processes that want the same folder wait. A crash at any point leaves either the whole folder or none; what a
    crashed attempt left behind is removed by the next one. Exceptions of `write` pass through.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        prefix = f".{target.name}.tmp-"
        for leftover in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            write(temporary)
            temporary.chmod(0o755)
            for path in temporary.rglob("*"):
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() else 0o644)
                    _sync(path)
            _sync(temporary)
            temporary.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock between processes; the operating system frees it should the holder die."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
