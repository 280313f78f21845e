"""The pool of the native ops: its size, two callers at once, a forked child."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peftserve_kernels.cpu.extension import HAS_NATIVE
from peftserve_kernels.cpu.tape import Tape, TapeMemory
from peftserve_kernels.cpu.threads import available_cores, set_threads
from peftserve_kernels.linear import linear_logits
from tests.kernels.native import same_bits, threads

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

FORK = """
import os, sys, torch
from peftserve_kernels.cpu.threads import set_threads
from peftserve_kernels.linear import linear_logits
set_threads(2)
x, weight = torch.randn(4, 512), torch.randn(1024, 512)
before = linear_logits(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear_logits(x, weight), before) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("limit", "cores"), [("50000 100000", 1), ("100000 100000\n", 1), ("max 100000", AFFINITY)])
def test_a_quota_of_cgroup_v2_bounds_the_cores(tmp_path: Path, limit: str, cores: int) -> None:
    write(tmp_path / "cpu.max", limit)
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("100000", 1), ("-1", AFFINITY)])
def test_a_quota_of_cgroup_v1_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", quota)
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert available_cores(tmp_path) == cores


def test_without_a_quota_the_cores_are_those_of_the_affinity(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == AFFINITY
    write(tmp_path / "cpu.max", "a line that nobody knows")
    assert available_cores(tmp_path) == AFFINITY


def test_no_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="threads: 0"):
        set_threads(0)


@pytest.mark.skipif(not HAS_NATIVE, reason="the extension is not built")
def test_two_callers_at_once_both_get_their_results() -> None:
    """A replay gives up the interpreter lock, so another thread's call finds the pool in use."""
    cases = [(torch.randn(4, 512), torch.randn(1024, 512)) for _ in range(2)]
    with threads(1):
        alone = [linear_logits(x, weight).clone() for x, weight in cases]
    tapes, results = [], []
    with threads(3):
        for x, weight in cases:
            memory = TapeMemory()
            tape = Tape(memory)
            with tape.recording():
                results.append(linear_logits(x, weight))
            tapes.append((tape, memory))

        def replay(tape: Tape) -> None:
            for _ in range(200):
                tape.replay(len(cases[0][0]))

        for result in results:
            result.zero_()
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(replay, [tape for tape, _ in tapes]))
    assert all(same_bits(result, expected) for result, expected in zip(results, alone, strict=True))


@pytest.mark.skipif(not HAS_NATIVE or not hasattr(os, "fork"), reason="needs the extension and fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
