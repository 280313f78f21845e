"""The command-line options that all benchmarks share."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from peftserve.config import EngineConfig
from peftserve.errors import ConfigurationError
from peftserve.model.prepare import find_prepared
from peftserve_kernels.cpu.threads import available_cores, set_threads, threads

Out = Annotated[Path, typer.Option(help="Folder for the JSON and the pictures", file_okay=False)]
Quick = Annotated[bool, typer.Option("--quick", help="A smoke run in seconds: its figures mean nothing")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Turns of each variant; medians are of these")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads for every variant; 0: one for each available core")]
Model = Annotated[str, typer.Option(help="The embedded default by name, or a folder or .gguf file")]
DataDir = Annotated[Path, typer.Option(help="Where the prepared model lies (the server's data_dir)")]

DEFAULT_OUT = Path("build/bench")
DEFAULT_MODEL: str = EngineConfig().model
DEFAULT_DATA_DIR: Path = EngineConfig().data_dir


def use_threads(count: int) -> None:
    """Let torch and the native ops use `count` threads each, or one for each available core when it is 0."""
    set_threads(count or available_cores())
    torch.set_num_threads(threads())


def prepared(model: str, data_dir: Path) -> Path:
    """The checkpoint folder of `model`; ends the program when it has to be made first."""
    try:
        folder = find_prepared(model, data_dir)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    if folder is None:
        raise typer.BadParameter(f"{model} is not prepared: run `peftserve model pull`", param_hint="--model")
    return folder.resolve()
