"""How many threads the native ops use. They have a pool of their own: torch's number does not touch it."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

_count: int | None = None


def threads() -> int:
    """What `set_threads` said last; before that, a thread for each available core."""
    global _count
    if _count is None:
        _count = available_cores()
    return _count


def set_threads(count: int) -> None:
    """Let every native op use up to `count` threads from now on. Raises ValueError when it is less than 1."""
    global _count
    if count < 1:
        raise ValueError(f"threads: {count}, but an op needs at least 1")
    _count = count


def available_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may run on, and has the time for: by its affinity and by its container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time a period that the container has: `cpu.max` of cgroup v2, else the two files of v1."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    if not limit.isdecimal() or not period.isdecimal() or int(period) == 0:  # "max", or -1: none
        return None
    return int(limit) / int(period)
