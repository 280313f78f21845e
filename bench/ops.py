"""Every op against its reference, its rivals, and what the machine could do at best.

Usage: python bench/ops.py [--quick] [--out FOLDER] [--rounds N]
"""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
import typer

import options
import report
from machine import Limits, describe
from measure import Effort, interleave, median_ratio, spread
from nf4_cases import Case, Layer, layer_shapes
from op_cases import OpCases
from peftserve.model.spec import ModelSpec

RIVALS = ("reference", "bnb", "bnb_unpacked", "dense")

SMOLLM2 = ModelSpec(
    name="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
)
"""SmolLM2-135M."""
_TINY = ModelSpec(
    name="llama",
    hidden_size=128,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def main(
    out: options.Out = options.DEFAULT_OUT,
    quick: options.Quick = False,
    rounds: options.RoundsOption = 9,
    threads: options.Threads = 0,
) -> None:
    """Measure every op at M = 1, 8, 64, 512 tokens."""
    options.use_threads(threads)
    torch.manual_seed(0)
    effort = Effort(rounds=2, turn_s=0.001) if quick else Effort(rounds=rounds, turn_s=0.05)
    limits = Limits(quick=quick)
    machine = describe(limits, effort)
    report.show_machine(machine)
    with torch.inference_mode():
        linear = [_measure(case, limits, effort) for case in _linear_cases(quick)]
        _show_linear(linear)
        others = [_measure(case, limits, effort) for case in _other_cases(quick)]
        _show_others(others)
    report.write_json(
        out / "ops.json",
        machine=machine,
        settings={"rounds": effort.rounds, "turn_s": effort.turn_s, "quick": quick},
        results=linear + others,
    )


def _token_counts(quick: bool) -> tuple[int, ...]:
    return (1, 3, 70) if quick else (1, 8, 64, 512)


def _linear_cases(quick: bool) -> Iterator[Case]:
    spec = _TINY if quick else SMOLLM2
    square = 256 if quick else 4096
    shapes = [(f"{square}x{square}", square, square)] + [
        (f"{name} {rows}x{columns}", rows, columns)
        for name, rows, columns in layer_shapes(spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size)
    ]
    for name, rows, columns in shapes:
        layer = Layer(name, rows, columns, quick=quick)
        for tokens in _token_counts(quick):
            yield layer.case(tokens)


def _other_cases(quick: bool) -> Iterator[Case]:
    cases = OpCases(_TINY, (16,), quick=True) if quick else OpCases(SMOLLM2, (128, 1024), quick=False)
    for tokens in _token_counts(quick):
        yield from cases.at(tokens)


def _measure(case: Case, limits: Limits, effort: Effort) -> dict[str, Any]:
    """All variants of a case and the two limits in turns. Fractions of a limit are formed within a round."""
    report.progress.print(f"{case.op} {case.shape}, M = {case.tokens}")
    seconds = interleave(case.variants | limits.probes(), effort)
    read, gemm = seconds.pop("read"), seconds.pop("gemm")
    ours = seconds["ours"]
    least = [limits.seconds(r, g, nbytes=case.nbytes, flops=case.flops) for r, g in zip(read, gemm, strict=True)]
    read_s = [limits.seconds(r, 0.0, nbytes=case.nbytes, flops=0) for r in read]
    gemm_s = [limits.seconds(0.0, g, nbytes=0, flops=case.flops) for g in gemm]
    return {
        "op": case.op,
        "shape": case.shape,
        "tokens": case.tokens,
        "nbytes": case.nbytes,
        "flops": case.flops,
        "us": {name: statistics.median(values) * 1e6 for name, values in seconds.items()},
        "rounds_us": {name: [value * 1e6 for value in values] for name, values in seconds.items()},
        "speedup_over": {name: median_ratio(times, ours) for name, times in seconds.items() if name != "ours"},
        "of_read_bandwidth": median_ratio(read_s, ours),
        "of_gemm_flops": median_ratio(gemm_s, ours),
        "of_limit": median_ratio(least, ours),
        "spread": spread(ours),
    }


def _show_linear(results: list[dict[str, Any]]) -> None:
    rows = [
        [
            *(entry["shape"], str(entry["tokens"]), f"{entry['us']['ours']:,.0f}"),
            f"{entry['us']['int8']:,.0f}" if "int8" in entry["us"] else "",
            *(f"{entry['us'][name]:,.0f}" for name in RIVALS),
            *(f"{entry['speedup_over'][name]:.2f}" for name in RIVALS),
            *(f"{entry['of_read_bandwidth']:.0%}", f"{entry['of_gemm_flops']:.0%}"),
        ]
        for entry in results
    ]
    rivals = [name.replace("_", " ") for name in RIVALS]
    columns = [
        "shape",
        "M",
        "ours µs",
        "with int8 inputs",
        *(f"{name} µs" for name in rivals),
        *(f"× {name}" for name in rivals),
    ]
    report.show_table("nf4_linear (weights not in the cache)", [*columns, "of read", "of FLOP/s"], rows)


def _show_others(results: list[dict[str, Any]]) -> None:
    rows = [
        [
            *(entry["op"], entry["shape"], str(entry["tokens"])),
            *(f"{entry['us'][name]:,.1f}" for name in ("ours", "reference")),
            f"{entry['speedup_over']['reference']:.2f}",
            f"{entry['speedup_over']['dense']:.2f}" if "dense" in entry["us"] else "",
            f"{entry['of_limit']:.0%}",
        ]
        for entry in results
    ]
    columns = ["op", "case", "M", "ours µs", "reference µs", "× reference", "× dense", "of the limit"]
    report.show_table("all other ops", columns, rows, labels=2)


if __name__ == "__main__":
    typer.run(main)
