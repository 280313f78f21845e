"""Results for people and for machines: tables on the terminal, JSON files, pictures of curves."""

import datetime as dt
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1

# A file has no width; wrapped cells would be hard to read in it.
console = Console(width=None if sys.stdout.isatty() else 150)
progress = Console(stderr=True, style="dim")


def show_machine(machine: Mapping[str, Any]) -> None:
    """One line about the machine and its limits."""
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"load {machine['load_average']}; reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{machine['gemm_dtype']} product {machine['gemm_flops'] / 1e9:.0f} GFLOP/s"
    )


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> None:
    """A table whose first `labels` columns are text and all others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < labels else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(path: Path, *, machine: Mapping[str, Any], settings: Mapping[str, Any], results: Any) -> None:
    """`results` with what is needed to judge them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "schema_version": SCHEMA_VERSION,
        "measured_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"{path.name}: written")


def save_plot(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = True,
) -> None:
    """A PNG of lines by name, each (x values, y values); the y axis begins at 0, so that flat looks flat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", label=name)
    if log_x:
        ticks = sorted({value for x, _ in series.values() for value in x})
        # Up to 1 the axis is linear: a curve may begin at 0.
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    console.print(f"{path.name}: written")
