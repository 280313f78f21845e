"""A peftserve server as a child process that ends with its parent, however that ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftserve.errors import ConfigurationError, UnavailableError

START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 15.0
_LOG_LINES = 12
_READY = re.compile(r"peftserve is ready: .* on (http://\S+) and gRPC (\S+)")


@dataclass(frozen=True, slots=True)
class Server:
    """Where the child listens."""

    url: str
    target: str
    pid: int


# Of the caller's variables only those that choose kernels: settings come from `flags` alone.
_KEPT = ("PEFTSERVE_KERNELS", "PEFTSERVE_CPU_ISA")


@contextmanager
def running_server(flags: Sequence[str], log: Path) -> Iterator[Server]:
    """`peftserve serve` with `flags`, from when it is ready to the block's end; its log goes to `log`.

    Raises `ConfigurationError` with the log's last lines when it does not start.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PEFTSERVE_") or key in _KEPT}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "peftserve.cli", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            # Ctrl-C goes to us alone: we stop the server in order.
            start_new_session=True,
        )
    # SIGTERM must unwind our stack as Ctrl-C does, or the child would stay.
    before = signal.signal(signal.SIGTERM, _exit)
    found: list[Server] = []
    reader = threading.Thread(target=_read, args=(process, found), daemon=True)
    reader.start()
    try:
        yield _wait_ready(process, found, log)
    finally:
        signal.signal(signal.SIGTERM, before)
        _stop(process)
        reader.join(_STOP_TIMEOUT_S)


def _read(process: "subprocess.Popen[bytes]", found: list[Server]) -> None:
    """Reads the child's output to its end, so that it never waits for a full pipe; the ready line goes to `found`."""
    if process.stdout is None:
        return
    with process.stdout as lines:
        for line in lines:
            if match := _READY.search(line.decode("utf-8", "replace")):
                found.append(Server(match[1], match[2], process.pid))


def _wait_ready(process: "subprocess.Popen[bytes]", found: list[Server], log: Path) -> Server:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not found:
        if process.poll() is not None:
            tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:])
            raise ConfigurationError(f"the server ended with status {process.returncode} before it was ready:\n{tail}")
        if time.monotonic() > deadline:
            raise UnavailableError(f"the server was not ready after {START_TIMEOUT_S:.0f} s; its log is {log}")
        time.sleep(0.05)
    return found[0]


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)
