"""Zeros that take memory as they are written."""

import subprocess
import sys

import pytest
import torch

from peftserve_kernels.zeros import zeros

_SCRIPT = """
import re
from pathlib import Path

import torch

from peftserve_kernels.zeros import zeros

def kib():
    status = Path("/proc/self/status").read_text()
    return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+) kB", status)))

x = zeros((64, 1 << 20), torch.uint8)
x[0, 0] = 1  # what torch needs for a first time
before = kib()
x = zeros((64, 1 << 20), torch.uint8)
assert kib() - before < 500, kib() - before
x[3] = 1
assert 1000 < kib() - before < 2000, kib() - before
assert x[3].all()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), (2, 0), ()])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype, huge_pages: bool) -> None:
    expected = torch.zeros(shape, dtype=dtype)
    for device in ("cpu", torch.device("cpu")):
        x = zeros(shape, dtype, device, huge_pages=huge_pages)
        assert (x.dtype, x.shape) == (expected.dtype, expected.shape)
        assert torch.equal(x, expected)
        assert torch.equal(x.fill_(2), torch.full_like(expected, 2))
    assert zeros(shape, dtype, "meta").device.type == "meta"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_comes_with_the_first_write() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
