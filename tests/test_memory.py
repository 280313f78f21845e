"""Giving memory back: less of it, and everything still works."""

import importlib
import subprocess
import sys

import pytest

from peftserve import memory

_SCRIPT = """
import re
from pathlib import Path

import torch

from peftserve import memory

def kib(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

held = [bytes(1000) for _ in range(100_000)]
held = held[::100]  # what is freed lies between what is kept: only a trim returns it
memory.share_one_heap()
files, anonymous = kib("RssFile"), kib("RssAnon")
memory.drop_library_pages()
assert kib("RssFile") < files / 2, (files, kib("RssFile"))
assert kib("RssAnon") > anonymous - 1000, "what the process wrote itself must stay"
x = torch.arange(12.0).view(3, 4)
assert (x @ x.t()).sum().item() == 1134.0
memory.release_freed()
assert kib("RssAnon") < anonymous - 50_000, (anonymous, kib("RssAnon"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_gives_back_what_it_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_spared_module_is_empty_for_a_block_and_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "this"]:
        monkeypatch.delitem(sys.modules, name)
    with memory.spared("this"):
        assert not hasattr(importlib.import_module("this"), "s")
        with pytest.raises(ImportError):
            importlib.import_module("this.part")
    with pytest.raises(ZeroDivisionError), memory.spared("this"):
        raise ZeroDivisionError
    assert hasattr(importlib.import_module("this"), "s")
    with memory.spared("this"):
        assert hasattr(importlib.import_module("this"), "s"), "what is there already stays"
    assert hasattr(sys.modules["this"], "s")


def test_the_server_loads_no_pretty_printer_and_the_engine_no_compiler() -> None:
    code = (
        "import sys; import peftserve.cli.serve, peftserve.app; print('rich' in sys.modules);"
        "from peftserve.engine import process; process._build_engine();"
        "print('rich' in sys.modules, 'torch._prims' in sys.modules, 'torch._dynamo' in sys.modules);"
        "import rich.console, torch._meta_registrations, torch._dynamo"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    import torch

    if not torch.cuda.is_available():
        assert done.stdout.split() == ["False"] * 4
