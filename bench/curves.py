"""What a decode step costs as one thing grows: distinct adapters, ranks, context, registered adapters.

Usage: python bench/curves.py [--quick] [--out FOLDER] [--rounds N] [--model MODEL]

An engine core runs in this process. All points of a curve take turns in every round; a point's value in a round is the
median of its steps (with `churn` their mean).
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

import options
import report
from machine import Limits, describe
from measure import Effort, spread
from step_curves import QUICK, Curve, StepCurves, full_sizes


def main(
    out: options.Out = options.DEFAULT_OUT,
    quick: options.Quick = False,
    rounds: options.RoundsOption = 5,
    threads: options.Threads = 0,
    model: options.Model = options.DEFAULT_MODEL,
    data_dir: options.DataDir = options.DEFAULT_DATA_DIR,
    context_streams: Annotated[int, typer.Option(min=1, help="Streams of the context curve")] = 8,
) -> None:
    """Measure step times of 32 streams as adapters, ranks, context and registrations grow."""
    checkpoint = options.prepared(model, data_dir)
    options.use_threads(threads)
    sizes = QUICK if quick else full_sizes(rounds, context_streams)
    machine = describe(Limits(quick=quick), Effort(rounds=sizes.rounds, turn_s=0.001 if quick else 0.1))
    report.show_machine(machine)
    with tempfile.TemporaryDirectory() as folder:
        bench = StepCurves(checkpoint, Path(folder), sizes, threads)
        curves = [bench.distinct(), bench.ranks(), bench.context(machine["read_bytes_per_s"]), *bench.registered()]
    for curve in curves:
        _show(curve)
    report.write_json(
        out / "curves.json",
        machine=machine,
        settings={"quick": quick, **dataclasses.asdict(sizes)},
        results=[curve.document() for curve in curves],
    )
    for curve in curves:
        report.save_plot(
            out / f"curve-{curve.name}.png",
            {curve.title: (tuple(curve.rounds_ms), curve.medians())},
            title=curve.title,
            x_label=curve.x_label,
            y_label="ms" if curve.name == "lookup" else "ms a decode step",
        )


def _show(curve: Curve) -> None:
    first = next(iter(curve.rounds_ms))
    rows = [
        [f"{x:,}", f"{statistics.median(values):.3f}", f"{spread(values):.0%}", f"{curve.over(x, first):.3f}"]
        for x, values in curve.rounds_ms.items()
    ]
    columns = [curve.x_label, "ms", "spread of rounds", f"× {first:,}"]
    report.show_table(curve.title, columns, rows, labels=0)
    for finding, value in curve.findings.items():
        report.console.print(f"  {finding}: {value:.3f}")


if __name__ == "__main__":
    typer.run(main)
