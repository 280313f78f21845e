"""Run as a program: publishes an adapter and is killed (SIGKILL) at the Nth line that the adapters package executes.

Forks one child per N from a warm process, as importing takes longer than publishing. Prints one JSON line per N:
what a fresh store finds afterwards. The last N is one at which the child got to its end.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from peftserve.adapters import blobs
from peftserve.adapters import store as store_module
from peftserve.adapters.store import AdapterStore
from tests.adapters.files import SPEC, lora, push

_PACKAGE = str(Path(store_module.__file__).parent)
_STAGES = ("store.py", "upload.py", "blobs.py", "index.py", "locks.py")


def publish_and_die(root: Path, line: int) -> None:
    """Replace version 1 of `a` by version 2, and die at the given executed line."""
    store = AdapterStore(root, SPEC, max_rank=16)
    left = line

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE) or not path.endswith(_STAGES):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    push(store, "t", "a", lora(seed=2))
    sys.settrace(None)


def look(root: Path) -> dict[str, Any]:
    """What is there after the crash, seen by a new process's store."""
    store = AdapterStore(root, SPEC, max_rank=16)
    with contextlib.closing(store):
        record = store.get("t", "a")
        config, tensors = blobs.read_adapter(root, record.digest)
        expected_config, expected_arrays = lora(seed=2 if record.digest != sys.argv[2] else 1)
        whole = config == expected_config and all(
            tensors[name].float32().tolist() == array.tolist() for name, array in expected_arrays.items()
        )
        return {
            "version": 1 if record.digest == sys.argv[2] else 2,
            "whole": whole,
            "staging": len(os.listdir(root / "staging")),
            "orphans": sorted(set(blobs.stored_digests(root)) - {entry.digest for entry in store.history("t", "a")}),
            "published_again": push(store, "t", "a", lora(seed=2)).digest,
        }


def main() -> None:
    """Usage: crash_worker FOLDER DIGEST_OF_VERSION_1 FIRST STEP"""
    folder, first, step = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    line = first
    while True:
        root = folder / str(line)
        store = AdapterStore(root, SPEC, max_rank=16)
        push(store, "t", "a", lora(seed=1))
        store.close()
        child = os.fork()
        if child == 0:
            publish_and_die(root, line)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        survived = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        sys.stdout.write(json.dumps({"line": line, "survived": survived} | look(root)) + "\n")
        if survived:
            return
        line += step


if __name__ == "__main__":
    main()
