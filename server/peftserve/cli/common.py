"""What the client commands share: where the server is, and how to print."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from peftserve_client import Client, GrpcClient

Url = Annotated[
    str, typer.Option("--url", envvar="PEFTSERVE_URL", help="The server over HTTP", rich_help_panel="Connection")
]
Grpc = Annotated[
    str | None,
    typer.Option(
        "--grpc",
        envvar="PEFTSERVE_GRPC",
        metavar="HOST:PORT",
        help="Use gRPC, at this address, instead of HTTP",
        rich_help_panel="Connection",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="PEFTSERVE_API_KEY",
        help="API key; better in the environment, where `ps` does not show it",
        rich_help_panel="Connection",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines")]

DEFAULT_URL = "http://127.0.0.1:8000"


def connect(url: str, grpc: str | None, api_key: str | None) -> "Client | GrpcClient":
    """A client for the server that the options name."""
    if grpc:
        from peftserve_client import GrpcClient

        return GrpcClient(grpc, api_key=api_key)
    from peftserve_client import Client

    return Client(url, api_key=api_key)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    import msgspec

    typer.echo(json.dumps(msgspec.to_builtins(value), ensure_ascii=False))


def console() -> "Console":
    """For tables and text, on standard output."""
    from rich.console import Console

    return Console(highlight=False)


def progress_bar(*, quiet: bool = False) -> "Progress":
    """A bar on standard error for bytes or steps; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )


def size_text(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
