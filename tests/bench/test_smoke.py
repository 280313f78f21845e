"""The benchmarks run from end to end on a tiny model, and write what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[2] / "bench" / "run.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what `run.py --quick` wrote."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, RUN, "--quick", f"--out={out}", f"--model={tiny_checkpoint}", "--threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=280)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return out


def read(results: Path, name: str) -> Any:
    text = (results / f"{name}.json").read_text()
    document = json.loads(text)
    assert document["schema_version"] == 1
    assert document["machine"]["read_bytes_per_s"] > 0
    assert document["machine"]["gemm_flops"] > 0
    assert document["machine"]["threads"] == 1
    assert document["settings"]["quick"] is True
    # Results are published: nothing may tell whose machine it was.
    assert f'"{os.uname().nodename}"' not in text
    assert str(results) not in text
    assert str(RUN.parent) not in text
    return document["results"]


def test_ops(results: Path) -> None:
    entries = read(results, "ops")
    linear = [entry for entry in entries if entry["op"] == "nf4_linear"]
    assert len(linear) == 5 * 3
    assert all(set(entry["us"]) == {"ours", "reference", "bnb", "bnb_unpacked", "dense"} for entry in linear)
    assert {entry["op"] for entry in entries} == {
        "bottleneck_add",
        "embedding",
        "linear_logits",
        "lora_add",
        "nf4_linear",
        "paged_attention",
        "rms_norm",
        "rope_and_store_kv",
        "sample",
        "silu_mul",
    }
    for entry in entries:
        assert min(entry["us"].values()) > 0
        assert set(entry["speedup_over"]) == set(entry["us"]) - {"ours"}


def test_serving(results: Path) -> None:
    found = read(results, "serving")
    assert [(load["workload"], load["streams"]) for load in found["loads"]] == [
        (workload, streams) for streams in (1, 4) for workload in ("base", "loras", "mix")
    ]
    for load in found["loads"]:
        assert load["tokens_per_s"] > 0
        assert (load["peft_tokens_per_s"] is None) == (load["workload"] == "mix")
    assert [entry["streams"] for entry in found["ratios"]] == [1, 4]
    assert 0 < found["memory_bytes"]["engine"] < found["memory_bytes"]["total"]


def test_curves(results: Path) -> None:
    curves = {curve["name"]: curve for curve in read(results, "curves")}
    assert set(curves) == {"distinct", "ranks", "context", "registered", "churn", "lookup"}
    assert [point["x"] for point in curves["distinct"]["points"]] == [0, 1, 3, 6]
    for curve in curves.values():
        assert all(point["ms"] > 0 and len(point["rounds_ms"]) == 2 for point in curve["points"])
        assert curve["findings"]


def test_pictures(results: Path) -> None:
    pictures = sorted(results.glob("*.png"))
    assert [picture.stem for picture in pictures] == [
        "curve-churn",
        "curve-context",
        "curve-distinct",
        "curve-lookup",
        "curve-ranks",
        "curve-registered",
        "serving",
    ]
    assert all(picture.read_bytes().startswith(PNG_SIGNATURE) for picture in pictures)


def test_gpu_check_on_the_interpreter(tmp_path: Path) -> None:
    script = RUN.with_name("gpu_check.py")
    environment = dict(os.environ) | {"PEFTSERVE_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    command = [sys.executable, script, "--device=cpu", "--quick", "--rounds=1", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["results"]["ops"]
    assert {"nf4_linear", "lora_add", "bottleneck_add", "paged_attention", "sample"} <= {row["op"] for row in rows}
    assert {"ours", "bnb", "dense"} <= rows[0]["us"].keys()


def test_gpu_check_says_when_there_is_no_card(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, RUN.with_name("gpu_check.py"), f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        env=dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert done.returncode == 2
    assert "nothing was measured" in done.stdout
