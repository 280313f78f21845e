import pytest

from peftserve_kernels.gpu.launch import Target
from peftserve_kernels.gpu.peer import library, peer_kernels
from peftserve_kernels.report import CallLine, KernelLine, Report, main, text

COUNTS = {"total": 0, "tensor": 0, "global_loads": 0, "shared_loads": 0, "shuffles": 0}
BINARY = {
    "registers": 96,
    "spills": 0,
    "shared": 20480,
    "occupancy": 0.25,
    "whole": COUNTS | {"total": 800, "tensor": 20},
    "loop": COUNTS | {"total": 120, "tensor": 8, "global_loads": 3},
}


def kernel_line(**changes: object) -> KernelLine:
    fields: dict[str, object] = {
        "target": "sm_90", "op": "nf4_linear o", "model": "a", "rows": 1, "dtype": "bfloat16", "kernel": "multiply",
        "grid": (1, 64, 1), "constants": "BLOCK_M=16", "num_warps": 4, "num_stages": 3, "binary": BINARY,
        "instructions_per_weight": 3.456, "faults": [],
    }  # fmt: skip
    return KernelLine(**(fields | changes))  # type: ignore[arg-type]


def row_of(output: str, *cells: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    return [row for row in rows if all(cell in row for cell in cells)]


def test_equal_binaries_share_a_line() -> None:
    report = Report(kernels=[kernel_line(), kernel_line(rows=8), kernel_line(model="b"), kernel_line(num_warps=8)])
    output = text(report)
    (row,) = row_of(output, "multiply", "4x3")
    assert row == [
        "nf4_linear o", "multiply", "4x3", "96", "0", "20480", "25%", "120/800", "8/20", "3", "0", "0", "3.46",
        "a 1,8; b 1",
    ]  # fmt: skip
    assert len(row_of(output, "multiply")) == 2
    assert output.endswith("No faults.\n")


def test_times_are_called_predictions_and_name_their_limit() -> None:
    calls = [
        CallLine("sm_90", "nf4_linear o", "a", 1, "bfloat16", 3_350_000, 1000, memory_us=1.0, compute_us=0.1),
        CallLine("sm_90", "nf4_linear o", "a", 2048, "bfloat16", 3_350_000, 1000, memory_us=1.0, compute_us=7.5),
    ]
    output = text(Report(kernels=[kernel_line()], calls=calls))
    assert "PREDICTION, not a measurement: the least time at 3350 GB/s" in output
    assert row_of(output, "a", "1")[-1][-2:] == ["1.00", "memory"]
    assert row_of(output, "a", "2048")[0][-2:] == ["7.50", "arithmetic"]


def test_faults_are_listed() -> None:
    report = Report(kernels=[kernel_line(binary=None, instructions_per_weight=None, faults=["does not compile: X: y"])])
    assert report.faults == ["sm_90 nf4_linear o multiply a M=1 bfloat16: does not compile: X: y"]
    assert text(report).endswith("FAULTS:\n" + report.faults[0] + "\n")
    assert row_of(text(report), "multiply")[0][3] == "does not compile"


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--target", "sm_70"])
    assert "sm_70" in capsys.readouterr().err


def test_bitsandbytes_kernels_are_read_from_its_wheel() -> None:
    if library() is None:
        pytest.skip("this bitsandbytes brings no CUDA 13.0 library")
    kernels = {kernel.name: kernel for kernel in peer_kernels(Target("cuda", 90))}
    simt = kernels["gemm_4bit_simt<bf16, 1>"]
    # a lane loads 16 bytes a turn, looks each weight up with a shuffle, and multiplies without tensor cores
    assert (simt.weights, simt.loop.shuffles, simt.loop.tensor) == (32, 32, 0)
    assert 4 < simt.instructions_per_weight < 16
    assert kernels["gemm_4bit_sm80_m16n8k16<bf16, 32, 64, 128>"].loop.tensor > 0
    assert peer_kernels(Target("hip", "gfx942")) == ()
