"""`peftserve generate`: one question to a running server."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftserve.cli.common import DEFAULT_URL, ApiKey, Grpc, Json, Url, connect, print_json

if TYPE_CHECKING:
    from peftserve_client import Client, GenerateOptions, GrpcClient, Prompt


def generate(
    prompt: Annotated[str, typer.Argument(help="The question, or - to read it from standard input")],
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="Adapter; without it the base answers")] = None,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it comes")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated")] = None,
    json: Json = False,
    url: Url = DEFAULT_URL,
    grpc: Grpc = None,
    api_key: ApiKey = None,
) -> None:
    """Ask a running server for an answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if raw and system is not None:
        raise typer.BadParameter("--system needs the chat template; leave --raw out")
    given: dict[str, Any] = {
        "adapter_id": adapter,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    options: GenerateOptions = {key: value for key, value in given.items() if value is not None}  # type: ignore[assignment]
    with connect(url, grpc, api_key) as client:
        asked = _conversation(text, system, raw)
        if stream:
            _print_stream(client, asked, options, json)
            return
        result = client.generate(asked, **options)
        if json:
            print_json(result)
        else:
            typer.echo(result.text)


def _conversation(text: str, system: str | None, raw: bool) -> "Prompt":
    from peftserve_client.request import conversation

    return text if raw else conversation(text, system)


def _print_stream(client: "Client | GrpcClient", asked: "Prompt", options: "GenerateOptions", as_json: bool) -> None:
    for chunk in client.stream(asked, **options):
        if as_json:
            print_json(chunk)
        else:
            typer.echo(chunk.text, nl=False)
    if not as_json:
        typer.echo()
