"""`peftserve demo`: see one model answer a mixed batch."""

from pathlib import Path
from typing import Annotated

import typer

from peftserve.cli.model import pull_model


def demo(
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep model and adapters here; else adapters are temporary")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of the engine; 0 takes all cores")] = 0,
) -> None:
    """Start a server, upload an adapter of each kind while it answers, and ask them all at once."""
    from peftserve.config import EngineConfig
    from peftserve.demo.run import run

    model = pull_model(data_dir or EngineConfig().data_dir)
    run(model, data_dir=data_dir, threads=threads)
