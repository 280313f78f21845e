"""`peftserve demo`: one NF4 model, a bare base and three kinds of adapter, answered in one batch."""

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftserve.demo.child import Server, running_server
from peftserve.demo.observe import BatchWatch
from peftserve.demo.tasks import TASKS, Task, exact_match, examples
from peftserve.errors import ConfigurationError
from peftserve_client import Adapter, AsyncClient, AsyncGrpcClient, Message

ADAPTERS = Path(__file__).parent / "adapters"
MAX_TOKENS = 48
EXAMPLE = 0
_QUESTION = "What is the capital of France?"
_TRAFFIC = 2
_LOG_WIDTH = 120


@dataclass
class Row:
    """One request of the mixed batch and what came back."""

    task: Task | None
    adapter_id: str | None
    prompt: str
    expected: str | None = None
    answer: str = ""
    ttft_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0


@dataclass
class Traffic:
    """Requests to the bare base that keep running while adapters are uploaded."""

    answered: int = 0
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)


def run(model: Path, *, data_dir: Path | None = None, threads: int = 0) -> None:
    """The whole demo on the checkpoint `model`; returns when the server is gone.

    Without `data_dir` the adapters go to a temporary folder. Raises an error of `peftserve` or `peftserve_client`.
    """
    missing = [name for name in TASKS if not (ADAPTERS / name / "adapter_config.json").is_file()]
    if missing:
        raise ConfigurationError(f"the demo's adapters are not there: {', '.join(missing)}; see peftserve.demo.train")
    # A log file has no width of its own; 80 columns would fold every answer.
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    with tempfile.TemporaryDirectory(prefix="peftserve-demo-") as temporary:
        flags = ["--port", "0", "--grpc-port", "0", "--threads", str(threads), "--model", str(model)]
        flags += ["--data-dir", str(data_dir or Path(temporary) / "data"), "--served-model-name", "smollm2"]
        began = time.monotonic()
        with ExitStack() as stack:
            with out.status("starting the server"):
                server = stack.enter_context(running_server(flags, Path(temporary) / "server.log"))
            out.print(f"server ready in {time.monotonic() - began:.1f} s: {server.url}, gRPC {server.target}")
            asyncio.run(_demo(server, out))


async def _demo(server: Server, out: Console) -> None:
    async with AsyncClient(server.url) as http, AsyncGrpcClient(server.target) as grpc:
        async with _traffic(http) as traffic:
            for position, name in enumerate(TASKS):
                over_grpc = position == len(TASKS) - 1
                began = time.monotonic()
                adapter = await (grpc if over_grpc else http).adapters.push(name, ADAPTERS / name)
                _print_upload(out, adapter, "gRPC" if over_grpc else "HTTP", time.monotonic() - began, traffic)
        rows = _rows()
        watch = BatchWatch(server.url)
        async with watch:
            await asyncio.gather(*(_ask(http, row) for row in rows))
        _print_answers(out, rows)
        _print_batch(out, watch)
        await _grpc_call(grpc, out)


@asynccontextmanager
async def _traffic(client: AsyncClient) -> AsyncIterator[Traffic]:
    """The block runs while the base answers questions, one after another, on a few streams."""
    traffic = Traffic()
    started = asyncio.Event()

    async def stream() -> None:
        while True:
            chunks = client.stream(_chat("Tell me a story."), max_tokens=MAX_TOKENS, ignore_eos=True)
            async with aclosing(chunks):
                async for _ in chunks:
                    started.set()
            traffic.answered += 1

    traffic.tasks = [asyncio.create_task(stream()) for _ in range(_TRAFFIC)]
    began = asyncio.create_task(started.wait())
    try:
        await asyncio.wait([began, *traffic.tasks], return_when=asyncio.FIRST_COMPLETED)
        yield traffic
        for stream_task in traffic.tasks:
            if stream_task.done():
                stream_task.result()
    finally:
        ends: list[asyncio.Task[Any]] = [began, *traffic.tasks]
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


def _rows() -> list[Row]:
    """The mixed batch: each task's message to the base and to its adapter, and a question to the base."""
    rows = [Row(None, None, _QUESTION)]
    for task in TASKS.values():
        example = examples(task.name, "held_out", EXAMPLE + 1)[EXAMPLE]
        rows += [Row(task, adapter_id, example.prompt, example.answer) for adapter_id in (None, task.name)]
    return rows


async def _ask(client: AsyncClient, row: Row) -> None:
    began = time.monotonic()
    chunks = client.stream(_chat(row.prompt), adapter_id=row.adapter_id, max_tokens=MAX_TOKENS, temperature=0.0)
    async with aclosing(chunks):
        async for chunk in chunks:
            row.ttft_s = row.ttft_s or time.monotonic() - began
            row.tokens += len(chunk.token_ids)
            row.answer += chunk.text
    row.total_s = time.monotonic() - began


async def _grpc_call(client: AsyncGrpcClient, out: Console) -> None:
    name = next(iter(TASKS))
    prompt = examples(name, "held_out", EXAMPLE + 2)[EXAMPLE + 1].prompt
    result = await client.generate(_chat(prompt), adapter_id=name, max_tokens=MAX_TOKENS, temperature=0.0)
    out.print(f"\nover gRPC, {name}: [dim]{_escaped(prompt)}[/dim]\n  {_escaped(result.text)}")


def _print_upload(out: Console, adapter: Adapter, door: str, seconds: float, traffic: Traffic) -> None:
    running = sum(not task.done() for task in traffic.tasks)
    out.print(
        f"uploaded {adapter.adapter_id} ({adapter.kind}, {adapter.size_bytes / 2**10:.0f} KiB) over {door} "
        f"in {seconds * 1000:.0f} ms, while {running} requests were running"
    )


def _print_answers(out: Console, rows: list[Row]) -> None:
    table = Table(title="One batch, the same message to the base and to the adapter", show_lines=True)
    table.add_column("message", ratio=4)
    table.add_column("answered by", ratio=2)
    table.add_column("answer", ratio=5)
    table.add_column("first token", justify="right")
    table.add_column("total", justify="right")
    asked = ""
    for row in rows:
        who = "base" if row.adapter_id is None or row.task is None else f"{row.adapter_id}\n({row.task.kind})"
        mark = " [green]✓[/green]" if row.expected is not None and exact_match(row.answer, row.expected) else ""
        table.add_row(
            "" if row.prompt == asked else _escaped(row.prompt),
            who,
            _escaped(" ".join(row.answer.split())) + mark,
            f"{row.ttft_s * 1000:.0f} ms",
            f"{row.total_s * 1000:.0f} ms",
        )
        asked = row.prompt
    out.print()
    out.print(table)


def _print_batch(out: Console, watch: "BatchWatch") -> None:
    adapters = ", ".join(watch.adapters) or "none"
    out.print(f"most requests in one engine step: {watch.running}; adapters among them: {adapters}")
    if set(watch.adapters) != set(TASKS):
        out.print("[yellow]the metrics were not read at a moment when all of them ran[/yellow]")


def _chat(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
