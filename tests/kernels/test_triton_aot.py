"""Kernels compiled for real chips. Here Triton interprets, so another process compiles: one for all quick tests."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from peftserve_kernels.gpu import aot, catalog
from peftserve_kernels.gpu.chips import CHIPS
from peftserve_kernels.gpu.launch import TARGETS, Target, launch, recording
from peftserve_kernels.gpu.peer import peer_kernels
from tests.kernels.planted_kernels import sound

pytestmark = pytest.mark.timeout(900)

LLAMA, SMOLLM = ("llama-3.1-8b",), ("smollm2-135m",)

# Every kernel on every CUDA target; every tile of nf4_linear on one of them; the full matrix is slow.
QUICK = [
    ["sm_80", SMOLLM, (16,)],
    ["sm_80", LLAMA, (512,)],
    ["sm_90", LLAMA, (1, 16, 64, 512)],
    ["sm_100", LLAMA, (16, 512)],
]

COMPILE = """
import json, sys
from dataclasses import asdict
from peftserve_kernels.report import Selection, make_report
selections = [Selection(target, *map(tuple, rest)) for target, *rest in json.loads(sys.argv[1])]
report = make_report(selections, quick=True)
json.dump({"kernels": [asdict(line) for line in report.kernels], "faults": report.faults}, sys.stdout)
"""


def compiling(arguments: list[str], cache: Path) -> Any:
    """JSON that a Python process without the interpreter prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiling(["-c", COMPILE, json.dumps(QUICK)], tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiling(["-m", "tests.kernels.planted_kernels"], tmp_path_factory.mktemp("triton"))


def kernels_launched(target: Target, models: tuple[catalog.Model, ...], rows: tuple[int, ...]) -> set[str]:
    uses = catalog.uses(target, models, rows, torch.bfloat16)
    return {launched.name for use in uses for launched in use.launches}


def test_no_kernel_has_a_fault(quick: Mapping[str, Any]) -> None:
    assert quick["faults"] == []


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_is_compiled(quick: Mapping[str, Any], name: str) -> None:
    target = Target("cuda", int(name.removeprefix("sm_")))
    wanted = kernels_launched(target, catalog.MODELS, (1, 64, 512))
    compiled = {line["kernel"] for line in quick["kernels"] if line["target"] == name}
    assert wanted <= compiled


def test_matrix_kernels_have_tensor_core_instructions_in_their_loops(quick: Mapping[str, Any]) -> None:
    found = {line["kernel"] for line in quick["kernels"] if line["binary"]["has_product"]}
    for line in quick["kernels"]:
        if line["binary"]["has_product"]:
            assert line["binary"]["whole"]["tensor"] > 0
    assert len(found) >= 4, f"only {sorted(found)} have a product"


def test_nf4_linear_needs_no_more_instructions_a_weight_than_bitsandbytes(quick: Mapping[str, Any]) -> None:
    """Thread instructions for each dequantised weight in the main loop, its share of the product included."""
    peers = {kernel.name: kernel.instructions_per_weight for kernel in peer_kernels(Target("cuda", 90))}
    if not peers:
        pytest.skip("this bitsandbytes brings no CUDA 13.0 library")
    by_rows = {1: peers["gemm_4bit_simt<bf16, 1>"], 16: peers["gemm_4bit_sm80_m16n8k16<bf16, 32, 64, 128>"]}
    checked = 0
    for line in quick["kernels"]:
        ours = line["instructions_per_weight"]
        if ours is not None and line["target"] == "sm_90" and line["rows"] in by_rows:
            assert 0 < ours <= by_rows[line["rows"]], f"{line['op']} M={line['rows']}"
            checked += 1
    assert checked >= 8


def test_a_sound_kernel_passes(planted: list[Mapping[str, Any]]) -> None:
    sound_kernel, small_product = planted[0], planted[2]
    assert sound_kernel["faults"] == []
    assert sound_kernel["binary"]["occupancy"] == 1.0
    assert small_product["faults"] == []
    # a turn of the loop multiplies 16 x 32 x 32, spread over four warps
    assert small_product["binary"]["loop"]["tensor_macs"] * 4 == 16 * 32 * 32


@pytest.mark.parametrize(
    ("index", "fault"),
    [(1, "spills"), (3, "a matrix product without tensor-core instructions"), (4, "shared memory: ")],
)
def test_each_check_fails_where_it_must(planted: list[Mapping[str, Any]], index: int, fault: str) -> None:
    (found,) = planted[index]["faults"]
    assert found.startswith(fault)


def test_arguments_are_specialised_as_for_a_launch(planted: list[Mapping[str, Any]]) -> None:
    assert planted[0]["signature"] == {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    assert planted[5]["signature"] == {"x": "*fp32", "y": "*fp32", "n": "constexpr", "BLOCK": "constexpr"}
    # an odd size and an unaligned pointer cost a kernel its wide loads
    assert [planted[index]["binary"]["whole"]["global_loads"] for index in (0, 6)] == [1, 4]


def test_an_interpreting_process_cannot_compile() -> None:
    floats = torch.empty(64, device="meta")
    with recording(TARGETS[0]) as launches:
        launch(sound, (1,), floats, floats, 64, BLOCK=64, num_warps=1)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.case(launches[0], TARGETS[0])


def test_blocks_resident() -> None:
    chip = CHIPS[Target("cuda", 80)]
    assert chip.blocks_resident(warps=4, registers=32, shared=0) == 16  # by warps
    assert chip.blocks_resident(warps=4, registers=255, shared=0) == 2  # by registers
    assert chip.blocks_resident(warps=4, registers=32, shared=54 * 1024) == 2  # by shared memory
    assert chip.blocks_resident(warps=1, registers=16, shared=0) == 32
    assert chip.blocks_resident(warps=8, registers=32, shared=200 * 1024) == 0


@pytest.mark.parametrize("target", CHIPS, ids=str)
def test_the_chips_are_the_targets(target: Target) -> None:
    assert target in TARGETS
    assert CHIPS[target].block_shared <= CHIPS[target].shared
    assert len(CHIPS) == len(TARGETS)


def test_the_catalog_runs_every_op() -> None:
    ops = {call.op.split()[0] for call in catalog.calls(catalog.MODELS[0], 16, torch.bfloat16)}
    assert ops == {
        "nf4_linear", "linear_logits", "lora_add", "bottleneck_add", "paged_attention", "rope_and_store_kv",
        "rms_norm", "silu_mul", "embedding", "sample", "apply_penalties",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_full_matrix(name: str, dtype: str, tmp_path: Path) -> None:
    models = [model.name for model in catalog.MODELS]
    report = compiling(["-c", COMPILE, json.dumps([[name, models, catalog.ROWS, [dtype]]])], tmp_path)
    assert report["faults"] == []
