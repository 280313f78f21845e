"""SIGKILL at any line of a publication: then there is the old version or the new one, whole, and no leftovers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftserve.adapters.store import AdapterStore
from tests.adapters.files import SPEC, lora, push

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_line(tmp_path: Path, step: int) -> None:
    store = AdapterStore(tmp_path / "expected", SPEC, max_rank=16)
    old, new = (push(store, "t", "a", lora(seed=seed)).digest for seed in (1, 2))
    store.close()
    worker = subprocess.run(
        [sys.executable, "-m", "tests.adapters.crash_worker", str(tmp_path), old, "1", str(step)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr
    runs = [json.loads(line) for line in worker.stdout.splitlines()]
    assert [run["line"] for run in runs] == list(range(1, 1 + step * len(runs), step))
    assert len(runs) > 100 // step
    assert [run["survived"] for run in runs] == [False] * (len(runs) - 1) + [True]
    for run in runs:
        assert run["whole"], run
        assert run["staging"] == 0, run
        assert run["orphans"] == [], run
        assert run["published_again"] == new, run
    versions = [run["version"] for run in runs]
    assert versions == sorted(versions)
    assert {versions[0], versions[-1]} == {1, 2}
