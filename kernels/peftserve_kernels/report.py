"""`python -m peftserve_kernels.report`: what the GPU kernels need and how fast they can be at best, without a GPU.

Every launch that serving makes is compiled for each target and looked into. Nothing here is measured: registers, memory
and instructions are read from the machine code, and times are what the card's bandwidth and arithmetic allow at the
least for the bytes and FLOP of the call.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from peftserve_kernels.gpu import aot, catalog
from peftserve_kernels.gpu.chips import CHIPS
from peftserve_kernels.gpu.peer import PeerKernel, peer_kernels

_PROCESSES: Final = 2
TARGETS: Final = {f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch): target for target in CHIPS}
"""Names of the targets: sm_80, sm_90, sm_100, gfx942."""

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class KernelLine:
    """One kernel of one call. instructions_per_weight: thread instructions a dequantised NF4 weight, in the main loop;
    None where the kernel dequantises nothing or its loop cannot be read."""

    target: str
    op: str
    model: str
    rows: int
    dtype: str
    kernel: str
    grid: tuple[int, ...]
    constants: str
    num_warps: int
    num_stages: int
    binary: dict[str, Any] | None
    instructions_per_weight: float | None
    faults: list[str]


@dataclass(frozen=True, slots=True)
class CallLine:
    """One call of an op: the bytes and FLOP that it needs at the least, and the time that the card needs for them."""

    target: str
    op: str
    model: str
    rows: int
    dtype: str
    bytes: int
    flops: int
    memory_us: float
    compute_us: float


@dataclass(frozen=True, slots=True)
class Report:
    """All figures. `peers`: target -> bitsandbytes' kernels."""

    kernels: list[KernelLine] = field(default_factory=list)
    calls: list[CallLine] = field(default_factory=list)
    peers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """One line for everything that must not be."""
        return [
            f"{line.target} {line.op} {line.kernel} {line.model} M={line.rows} {line.dtype}: {fault}"
            for line in self.kernels
            for fault in line.faults
        ]


class Selection(NamedTuple):
    """What to compile for one target: models, tokens a step and dtypes, all with all."""

    target: str
    models: tuple[str, ...]
    rows: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)


def make_report(selections: Sequence[Selection], *, quick: bool = False) -> Report:
    """Record, compile (each binary once) and look inside. Raises RuntimeError where Triton interprets.

    quick: what is checked and no more: the machine code of kernels with a matrix product alone, no peers.
    """
    cases: dict[str, aot.Case] = {}
    lines: list[tuple[str, catalog.Use, list[str]]] = []
    for name, models, rows, dtypes in selections:
        chosen = tuple(model for model in catalog.MODELS if model.name in models)
        for dtype in dtypes:
            for use in catalog.uses(TARGETS[name], chosen, rows, _DTYPES[dtype]):
                items = [aot.case(launch, TARGETS[name]) for launch in use.launches]
                cases.update((item.key, item) for item in items)
                lines.append((name, use, [item.key for item in items]))
    binaries = _compile(cases, quick)
    report = Report()
    for name, use, keys in lines:
        report.calls.append(_call_line(name, use))
        report.kernels.extend(_kernel_lines(name, use, [cases[key] for key in keys], [binaries[key] for key in keys]))
    if not quick:
        for name in dict.fromkeys(selection.target for selection in selections):
            report.peers[name] = [_peer_line(kernel) for kernel in peer_kernels(TARGETS[name])]
    return report


def _compile(cases: dict[str, aot.Case], quick: bool) -> dict[str, "aot.Binary | str"]:
    """Each case's binary, or what went wrong."""
    # Spawned, not forked: a compiler in the parent may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, mp_context=context) as pool:
        return dict(zip(cases, pool.map(partial(_try_compile, only_products=quick), cases.values()), strict=True))


def _try_compile(item: aot.Case, only_products: bool) -> "aot.Binary | str":
    try:
        return aot.compile_case(item, only_products=only_products)
    except Exception as error:  # the compiler's own kinds are many, and none may end the report
        # an error in a function that a kernel calls names the call, and has the reason behind it
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        return f"does not compile: {type(reason).__name__}: {reason}"


def _kernel_lines(
    name: str, use: catalog.Use, items: Sequence[aot.Case], results: Sequence["aot.Binary | str"]
) -> Iterable[KernelLine]:
    wants_tensor_cores = use.is_matrix and use.dtype != "float32"
    has_product = any(isinstance(result, str) or result.has_product for result in results)
    for launch, item, result in zip(use.launches, items, results, strict=True):
        binary = None if isinstance(result, str) else result
        faults = [result] if isinstance(result, str) else []
        if binary is not None:
            faults = aot.faults(item, binary, wants_tensor_cores=wants_tensor_cores)
        if launch is use.launches[-1] and wants_tensor_cores and not has_product:
            faults.append("none of the op's kernels has a matrix product")
        yield KernelLine(
            target=name,
            op=use.op,
            model=use.model,
            rows=use.rows,
            dtype=use.dtype,
            kernel=launch.name,
            grid=launch.grid,
            constants=", ".join(f"{key}={value}" for key, value in launch.constants.items()),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            binary=None if binary is None else binary.as_dict(),
            instructions_per_weight=None if binary is None else _instructions_per_weight(use, item, binary),
            faults=faults,
        )


def _instructions_per_weight(use: catalog.Use, item: aot.Case, binary: aot.Binary) -> float | None:
    """What a turn of the main loop executes over what it unpacks.

    A turn multiplies each weight that it unpacks with the rows of the block's tile, so its multiply-adds say how many
    weights there are, whatever the compiler unrolled. Blackwell's own products do not print their shape: each is 16
    deep, over the whole tile.
    """
    loop, constants = binary.loop, item.constexprs
    if not use.op.startswith("nf4_linear") or not loop.tensor or "BLOCK_M" not in constants:
        return None
    weights: float = loop.tensor * 16 * constants["BLOCK_N"]
    if loop.tensor_macs:
        weights = loop.tensor_macs * item.num_warps / constants["BLOCK_M"]
    return loop.total * item.num_warps * CHIPS[item.target].warp_size / weights


def _call_line(name: str, use: catalog.Use) -> CallLine:
    chip = CHIPS[TARGETS[name]]
    rate = chip.matrix_rate if use.is_matrix and use.dtype != "float32" else chip.vector_rate
    return CallLine(
        target=name,
        op=use.op,
        model=use.model,
        rows=use.rows,
        dtype=use.dtype,
        bytes=use.work.bytes,
        flops=use.work.flops,
        memory_us=use.work.bytes / chip.bandwidth * 1e6,
        compute_us=use.work.flops / rate * 1e6,
    )


def _peer_line(kernel: PeerKernel) -> dict[str, Any]:
    figures = asdict(kernel.loop)
    return {
        "name": kernel.name,
        "registers": kernel.registers,
        "shared": kernel.shared,
        "loop": figures,
        "weights": kernel.weights,
        "instructions_per_weight": kernel.instructions_per_weight,
    }


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(map(str, head)), *([str(cell) for cell in line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def _kernel_table(lines: Sequence[KernelLine]) -> str:
    """Equal binaries of one op and batch size are one line; models are named where their figures differ."""
    rows: dict[tuple[object, ...], list[KernelLine]] = {}
    ops = list(dict.fromkeys(line.op for line in lines))
    for line in sorted(lines, key=lambda line: ops.index(line.op)):
        if line.binary is None:
            figures: tuple[object, ...] = ("does not compile", *("",) * 9)
        else:
            whole, loop = line.binary["whole"], line.binary["loop"]
            counted = loop if loop["total"] else whole
            figures = (
                line.binary["registers"],
                line.binary["spills"],
                line.binary["shared"],
                f"{line.binary['occupancy']:.0%}",
                f"{loop['total'] or '-'}/{whole['total'] or '-'}",
                f"{counted['tensor']}/{whole['tensor']}",
                counted["global_loads"],
                counted["shared_loads"],
                counted["shuffles"],
                "" if line.instructions_per_weight is None else f"{line.instructions_per_weight:.2f}",
            )
        key = (line.op, line.kernel, f"{line.num_warps}x{line.num_stages}", *figures)
        rows.setdefault(key, []).append(line)

    def where(used: Sequence[KernelLine]) -> str:
        by_model: dict[str, list[int]] = {}
        for line in used:
            by_model.setdefault(line.model, []).append(line.rows)
        return "; ".join(f"{model} {','.join(map(str, dict.fromkeys(rows)))}" for model, rows in by_model.items())

    head = "op|kernel|warps x stages|registers|spills|shared|occupancy|loop/all instr.|tensor loop/all"
    head += "|global loads|shared loads|SHFL|instr./weight|used by (model M)"
    return _table(head.split("|"), ((*key, where(used)) for key, used in rows.items()))


def _call_table(lines: Sequence[CallLine]) -> str:
    return _table(
        ("op", "model", "M", "MB", "GFLOP", "at least, us", "limit"),
        (
            (
                line.op,
                line.model,
                line.rows,
                f"{line.bytes / 1e6:.3f}",
                f"{line.flops / 1e9:.3f}",
                f"{max(line.memory_us, line.compute_us):.2f}",
                "memory" if line.memory_us >= line.compute_us else "arithmetic",
            )
            for line in lines
        ),
    )


def text(report: Report) -> str:
    """The report as Markdown."""
    parts = []
    for name in dict.fromkeys(line.target for line in report.kernels):
        chip = CHIPS[TARGETS[name]]
        parts.append(f"## {name} ({chip.name})\n")
        parts.append(
            "Read from the machine code. Loads and SHFL: in the main loop, or in all where there is no loop.\n"
        )
        parts.append(_kernel_table([line for line in report.kernels if line.target == name]) + "\n")
        if peers := report.peers.get(name):
            parts.append("bitsandbytes' 4-bit kernels in its wheel, read the same way:\n")
            head = ("kernel", "registers", "static shared", "loop instr.", "tensor", "SHFL", "instr./weight")
            lines = (
                (
                    peer["name"],
                    peer["registers"],
                    peer["shared"],
                    peer["loop"]["total"],
                    peer["loop"]["tensor"],
                    peer["loop"]["shuffles"],
                    f"{peer['instructions_per_weight']:.2f}",
                )
                for peer in peers
            )
            parts.append(_table(head, lines) + "\n")
        parts.append(
            f"PREDICTION, not a measurement: the least time at {chip.bandwidth / 1e9:.0f} GB/s and "
            f"{chip.matrix_rate / 1e12:.0f} TFLOP/s ({chip.vector_rate / 1e12:.1f} without tensor cores). "
            f"Source: {chip.source}.\n"
        )
        parts.append(_call_table([line for line in report.calls if line.target == name]) + "\n")
    parts.append("\n".join(["FAULTS:", *report.faults]) if report.faults else "No faults.")
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 when a kernel spills, does not fit its chip, or misses the tensor cores."""
    names = [model.name for model in catalog.MODELS]
    parser = argparse.ArgumentParser(prog="python -m peftserve_kernels.report", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--model", nargs="+", choices=names, default=names[:2])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 512], help="tokens a step")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"])
    parser.add_argument("--quick", action="store_true", help="only what the checks need; no table is complete then")
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    options = parser.parse_args(arguments)
    chosen = (tuple(options.model), tuple(options.rows), tuple(options.dtype))
    report = make_report([Selection(name, *chosen) for name in options.target], quick=options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1))
    sys.stdout.write(text(report))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
