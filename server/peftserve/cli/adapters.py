"""`peftserve adapters push | list | show | rm | pin | unpin`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftserve.cli.common import (
    DEFAULT_URL,
    ApiKey,
    Grpc,
    Json,
    Url,
    connect,
    console,
    print_json,
    progress_bar,
    size_text,
)

if TYPE_CHECKING:
    from peftserve_client import Adapter

app = typer.Typer(help="Adapters of a running server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name")]


@app.command()
def push(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and the safetensors file")],
    pin: Annotated[bool, typer.Option("--pin", help="Keep it on the device")] = False,
    json: Json = False,
    url: Url = DEFAULT_URL,
    grpc: Grpc = None,
    api_key: ApiKey = None,
) -> None:
    """Upload an adapter, or a new version of it."""
    with connect(url, grpc, api_key) as client, progress_bar(quiet=json) as bar:
        task = bar.add_task(f"uploading {name}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        adapter = client.adapters.push(name, folder, progress=show)
        if pin:
            adapter = client.adapters.pin(name)
    if json:
        print_json(adapter)
    else:
        typer.echo(f"{adapter.adapter_id}: {adapter.kind}, {size_text(adapter.size_bytes)}, sha256:{adapter.digest}")


@app.command("list")
def list_(json: Json = False, url: Url = DEFAULT_URL, grpc: Grpc = None, api_key: ApiKey = None) -> None:
    """List the adapters."""
    with connect(url, grpc, api_key) as client:
        adapters = client.adapters.list()
    if json:
        print_json(adapters)
        return
    from rich.table import Table

    table = Table("name", "kind", "size", "where", "pinned", "digest", "uploaded", box=None)
    for adapter in adapters:
        table.add_row(
            adapter.adapter_id,
            adapter.kind,
            size_text(adapter.size_bytes),
            adapter.residency.state if adapter.residency else "disk",
            "yes" if adapter.pinned else "",
            adapter.digest[:12],
            f"{adapter.created_at:%Y-%m-%d %H:%M}",
        )
    screen = console()
    if not screen.is_terminal:
        screen.width = 1000  # whoever reads it by line wants names whole
    screen.print(table if adapters else "no adapters")


@app.command()
def show(name: Name, json: Json = False, url: Url = DEFAULT_URL, grpc: Grpc = None, api_key: ApiKey = None) -> None:
    """Show one adapter: its kind, version, and where the server holds it."""
    with connect(url, grpc, api_key) as client:
        _print(client.adapters.get(name), json)


@app.command()
def rm(name: Name, json: Json = False, url: Url = DEFAULT_URL, grpc: Grpc = None, api_key: ApiKey = None) -> None:
    """Remove an adapter; requests that run on it end normally."""
    with connect(url, grpc, api_key) as client:
        client.adapters.delete(name)
    if json:
        print_json({"removed": name})
    else:
        typer.echo(f"{name}: removed")


@app.command()
def pin(name: Name, json: Json = False, url: Url = DEFAULT_URL, grpc: Grpc = None, api_key: ApiKey = None) -> None:
    """Keep an adapter on the device; it is never evicted."""
    with connect(url, grpc, api_key) as client:
        _print(client.adapters.pin(name), json)


@app.command()
def unpin(name: Name, json: Json = False, url: Url = DEFAULT_URL, grpc: Grpc = None, api_key: ApiKey = None) -> None:
    """Let an adapter be evicted again."""
    with connect(url, grpc, api_key) as client:
        _print(client.adapters.pin(name, pinned=False), json)


def _print(adapter: "Adapter", as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    from rich.table import Table

    rows: dict[str, Any] = {
        "name": adapter.adapter_id,
        "kind": adapter.kind,
        "digest": adapter.digest,
        "pinned": "yes" if adapter.pinned else "no",
        "size": size_text(adapter.size_bytes),
        "uploaded": f"{adapter.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "base model": adapter.base_model_name or "not stated",
        **adapter.details,
    }
    if place := adapter.residency:
        rows["where"] = place.state
        rows["in use by"] = f"{place.refs} requests"
        rows["memory"] = f"{size_text(place.host_bytes)} host, {size_text(place.device_bytes)} device"
        if place.load_s is not None:
            rows["last load"] = f"{place.load_s * 1000:.0f} ms"
        if place.error:
            rows["error"] = place.error
    else:
        rows["where"] = "disk"
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        table.add_row(key, str(value))
    console().print(table)
