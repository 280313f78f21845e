"""Memory that a process does not need: not taken, or given back to the system. A leaf.

Giving back takes Linux and glibc; elsewhere nothing happens.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

_MADV_DONTNEED: Final = 4  # of <sys/mman.h>
_M_ARENA_MAX: Final = -8  # of <malloc.h>
_SMAPS: Final = Path("/proc/self/smaps")
# "7f0e40000000-7f0e40021000 r-xp 00000000 fe:01 1234   /usr/lib/libc.so.6", then lines such as "Anonymous:   0 kB"
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+\s*(.*)")
_LIBRARY: Final = re.compile(r"\.so(\.[0-9.]+)?$")


@contextmanager
def spared(module: str) -> Iterator[None]:
    """In this block `module` is empty to whoever imports it: for a part of a library that it has no use for here."""
    if module in sys.modules:  # what is there already stays
        yield
        return
    sys.modules[module] = ModuleType(module)
    try:
        yield
    finally:
        del sys.modules[module]


def share_one_heap() -> None:
    """Let all threads allocate from one heap. To be called before there are others.

    glibc gives a thread that finds the heap in use another one for good, and what is free in one is lost to the rest.
    Here mostly one thread runs at a time anyway, so that they seldom wait for each other.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)


def drop_library_pages() -> None:
    """Let go of the code and constants of shared libraries, which stay in the system's cache. Takes ten milliseconds.

    Starting touches most of them, serving few: those come back, page by page, as they are used.
    """
    libc = _libc()
    if libc is None:
        return
    for start, end in _clean_library_pages():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def release_freed() -> None:
    """What was freed and only the allocator still holds, 20 MB and more after an adapter was read. Takes milliseconds,
    in which no other thread can allocate."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def _clean_library_pages() -> Iterator[tuple[int, int]]:
    """Mappings of libraries that nobody can have changed: read-only, and without a page of their own. (A page that was
    relocated would be lost.)"""
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return
    candidate: tuple[int, int] | None = None
    for line in lines:
        if mapping := _MAPPING.fullmatch(line):
            start, end, permissions, path = mapping.groups()
            is_candidate = permissions[1] == "-" and permissions[3] == "p" and _LIBRARY.search(path)
            candidate = (int(start, 16), int(end, 16)) if is_candidate else None
        elif candidate and line.split() == ["Anonymous:", "0", "kB"]:
            yield candidate
