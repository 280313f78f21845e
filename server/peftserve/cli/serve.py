"""`peftserve serve`: its flags are the fields of `config.py`."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from peftserve import config, settings

_HELP = """Serve the base model and its adapters over HTTP and gRPC.

Every flag is also the environment variable PEFTSERVE_<FLAG> and a key of the YAML file given by --config; a flag wins
over the environment, the environment over the file. Lists are comma-separated, mappings KEY=VALUE,KEY=VALUE; @PATH
reads either from a file."""


def command() -> Callable[..., None]:
    """The command, with one option for each setting."""

    def serve(**values: Any) -> None:
        config_file = values.pop("config")
        built = settings.load(values, os.environ, config_file)
        # The server never forks; grpc's fork handlers would only log at every start of a child. Read when grpc loads.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        from peftserve.app import run

        run(built)

    parameters = [_option("config", Path, typer.Option(help="YAML file of settings", dir_okay=False))]
    for section, fields in settings.sections().items():
        for name, info in fields.items():
            parameters.append(_option(name, bool if settings.shape(info) is bool else str, _flag(name, info, section)))
    serve.__doc__ = _HELP
    # typer reads a command's options from its signature.
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return serve


def _option(name: str, kind: type, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(name: str, info: FieldInfo, section: str) -> Any:
    flag = f"--{name.replace('_', '-')}"
    is_bool = settings.shape(info) is bool
    return typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_bool else flag,
        help=f"{info.description}{_default(info)}",
        show_default=False,
        metavar=None if is_bool else _metavar(info),
        rich_help_panel=section.capitalize(),
    )


def _default(info: FieldInfo) -> str:
    default = info.default
    if default is PydanticUndefined or default == "":
        return ""
    if isinstance(default, bool):
        text = "on" if default else "off"
    else:
        text = _size(default) if _is_bytes(info) else str(default)
    return f" (default: {text})"


def _metavar(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return "|".join(get_args(info.annotation))
    if _is_bytes(info):
        return "SIZE"
    names: dict[Any, str] = {int: "INTEGER", float: "NUMBER", Path: "PATH", dict: "KEY=VALUE,...", list: "ITEM,..."}
    return names.get(info.annotation) or names.get(settings.shape(info)) or "TEXT"


def _is_bytes(info: FieldInfo) -> bool:
    return any(getattr(extra, "func", None) is config.parse_bytes for extra in info.metadata)


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)
