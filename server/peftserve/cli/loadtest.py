"""`peftserve loadtest`: what a running server does under load."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from peftserve.cli.common import DEFAULT_URL, ApiKey, Grpc, Json, Url, console, print_json, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from peftserve_client.loadtest import Group, Percentiles, Plan, Report


def loadtest(
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, max=1024, help="Streams at once")] = 8,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, max=1_000_000, help="Requests in all")] = 64,
    adapters: Annotated[
        str, typer.Option(help="The mix: names with optional weights; base is the bare model", metavar="A,B=2,base")
    ] = "base",
    prompt_words: Annotated[int, typer.Option(min=1, max=100_000, help="Random words per prompt")] = 60,
    max_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Tokens per answer")] = 64,
    seed: Annotated[int, typer.Option(help="For the prompts and the order of the mix")] = 0,
    json: Json = False,
    url: Url = DEFAULT_URL,
    grpc: Grpc = None,
    api_key: ApiKey = None,
) -> None:
    """Measure output tokens/s, time to first token, between tokens, and of whole answers, by adapter."""
    import uvloop

    from peftserve_client.loadtest import Plan, parse_mix

    try:
        mix = parse_mix(adapters)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--adapters") from None
    plan = Plan(
        requests=requests,
        concurrency=concurrency,
        mix=mix,
        prompt_words=prompt_words,
        max_tokens=max_tokens,
        seed=seed,
    )
    with progress_bar(quiet=json) as bar:
        task = bar.add_task("requests", total=requests)
        report = uvloop.run(_run(plan, url, grpc, api_key, lambda done: bar.update(task, completed=done)))
    if json:
        print_json(report)
    else:
        _print(report)
    if report.overall.errors == report.overall.requests:
        raise typer.Exit(1)


async def _run(
    plan: "Plan", url: str, grpc: str | None, api_key: str | None, progress: Callable[[int], None]
) -> "Report":
    from peftserve_client import AsyncClient, AsyncGrpcClient, RetryPolicy
    from peftserve_client.loadtest import run

    never = RetryPolicy(attempts=1)
    if grpc:
        async with AsyncGrpcClient(grpc, api_key=api_key, retry=never) as grpc_client:
            return await run(grpc_client, plan, progress)
    async with AsyncClient(url, api_key=api_key, retry=never) as http_client:
        return await run(http_client, plan, progress)


def _print(report: "Report") -> None:
    out = console()
    out.print(_table(report))
    out.print(
        f"{report.output_tokens_per_s:.1f} output tokens/s, {report.requests_per_s:.2f} requests/s; "
        f"{report.output_tokens} tokens in {report.duration_s:.1f} s, {report.plan.concurrency} streams"
    )
    for code, count in sorted(report.errors.items()):
        out.print(f"[red]{count} x {code}[/red]")


def _table(report: "Report") -> "Table":
    from rich.table import Table

    table = Table(title="milliseconds: p50 / p90 / p99", title_justify="left")
    for column in ("adapter", "requests", "errors", "tokens", "TTFT", "ITL", "E2E"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    rows: list[Group] = [*report.by_adapter, report.overall] if len(report.by_adapter) > 1 else [report.overall]
    for group in rows:
        table.add_row(
            group.name,
            str(group.requests),
            str(group.errors),
            str(group.output_tokens),
            _cell(group.ttft_ms),
            _cell(group.itl_ms),
            _cell(group.e2e_ms),
        )
    return table


def _cell(values: "Percentiles | None") -> str:
    return "–" if values is None else f"{values.p50:.1f} / {values.p90:.1f} / {values.p99:.1f}"
