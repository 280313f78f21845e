"""The server as a user runs it: `peftserve serve` in a process of its own, on free ports."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

READY_S = 180.0
_READY_LINE = re.compile(r"ready: .* on (http://\S+) and gRPC (\S+)")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server; `http` is its base URL, `grpc` an address."""

    http: str
    grpc: str
    process: subprocess.Popen[str]
    log: Path

    def engine(self) -> psutil.Process:
        """The engine process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "peftserve.engine.process" in " ".join(child.cmdline()))

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by `name{labels}`."""
        samples = {}
        for line in httpx.get(f"{self.http}/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def gauge(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)


@contextmanager
def running_server(model: Path | str, data_dir: Path, **settings: object) -> Iterator[ServerProcess]:
    """Start a server and wait until it is ready; on leaving it gets SIGTERM and must end with 0."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [
        *(str(Path(sys.executable).with_name("peftserve")), "serve", f"--model={model}", f"--data-dir={data_dir}"),
        *("--port=0", "--grpc-port=0", *flags),
    ]
    log = data_dir / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=dict(os.environ))
    try:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        line = process.stdout.readline()
        found = _READY_LINE.search(line)
        if not found:
            raise AssertionError(f"the server did not start: {line!r}\n{log.read_text()}")
        yield ServerProcess(http=found[1], grpc=found[2], process=process, log=log)
        process.send_signal(signal.SIGTERM)
        if (status := process.wait(READY_S)) != 0:
            raise AssertionError(f"the server ended with {status}\n{log.read_text()}")
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = READY_S, what: str = "the condition") -> None:
    """Poll until `condition` holds; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true in {timeout_s} s")
        time.sleep(0.02)
