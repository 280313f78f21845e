"""Advisory locks between threads and processes (flock(2)): released by the kernel when the holder dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hold(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock file `path`; many may share it, one alone has it exclusively. Blocks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def claim(folder: Path) -> int:
    """Mark a folder as in use; it stays so until the returned descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_claimed(folder: Path) -> bool:
    """Whether somebody alive has claimed the folder."""
    try:
        os.close(claim(folder))
    except BlockingIOError:
        return True
    return False
