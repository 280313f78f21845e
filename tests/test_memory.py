"""Giving memory back: less of it, and everything still works."""

import subprocess
import sys

import pytest

_SCRIPT = """
import re
from pathlib import Path

import torch

from peftserve import memory

def kib(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

held = [bytes(1000) for _ in range(100_000)]
held = held[::100]  # what is freed lies between what is kept: only a trim returns it
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
