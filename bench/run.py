"""All benchmarks, each in a process of its own, so that none inherits another's memory and threads.

Usage: python bench/run.py [--quick] [--out FOLDER] [--model MODEL] [--threads N] [--only NAME]
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import options

BENCHMARKS = ("ops", "serving", "curves")
_NEED_A_MODEL = frozenset({"serving", "curves"})


def main(
    out: options.Out = options.DEFAULT_OUT,
    quick: options.Quick = False,
    threads: options.Threads = 0,
    model: options.Model = options.DEFAULT_MODEL,
    data_dir: options.DataDir = options.DEFAULT_DATA_DIR,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(BENCHMARKS)}; may be repeated")] = None,
) -> None:
    """Run ops, serving and curves; JSON and pictures go to the folder of --out."""
    if unknown := sorted(set(only or ()).difference(BENCHMARKS)):
        raise typer.BadParameter(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}", param_hint="--only")
    common = [f"--out={out}", f"--threads={threads}", *(["--quick"] if quick else [])]
    with_model = [f"--model={model}", f"--data-dir={data_dir}"]
    for name in only or BENCHMARKS:
        script = Path(__file__).with_name(f"{name}.py")
        arguments = common + (with_model if name in _NEED_A_MODEL else [])
        status = subprocess.run([sys.executable, script, *arguments], check=False).returncode
        if status:
            raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
