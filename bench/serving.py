"""End to end: a real server under load, against PEFT's `generate` on the same prompts in the same run.

Usage: python bench/serving.py [--quick] [--out FOLDER] [--rounds N] [--model MODEL] [--int8-activations]
       [--adapter-dtype auto|model|int8]

The load is `peftserve loadtest`'s: a fixed number of streams over HTTP, random prompts, all answers of full length. The
client shares the machine's cores with the server. PEFT gets the prompts of each load in batches of as many as there
were streams, and pays for no network, no streaming and no client.
"""

import statistics
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import uvloop
from typing_extensions import Unpack

import options
import report
import synthetic
from machine import Limits, describe
from measure import Effort, median_ratio
from peft_baseline import PeftBaseline
from peftserve.demo.child import Server, running_server
from peftserve.model.config_reader import read_spec
from peftserve.model.spec import ModelSpec
from peftserve_client import AsyncClient, Chunk, Client, GenerateOptions, Prompt, RetryPolicy
from peftserve_client.loadtest import Plan, Report, Share, run
from synthetic import AdapterFiles

RANKS = (4, 8, 16, 64)
PREFIX_TOKENS = 16
BOTTLENECK_WIDTH = 32
LORAS = tuple(f"lora-r{rank}" for rank in RANKS)

WORKLOADS: dict[str, tuple[Share, ...]] = {
    "base": (Share(None),),
    "loras": (Share(None), *map(Share, LORAS)),
    "mix": (Share(None), *map(Share, (*LORAS, "prefix", "bottleneck"))),
}
"""`mix` holds every kind; `loras` is the part of it that PEFT can run too."""
PEFT_WORKLOADS = ("base", "loras")


@dataclass(frozen=True, slots=True)
class Load:
    """The size of one measurement: requests are `waves` times the streams, but `least` of them at least."""

    streams: tuple[int, ...]
    waves: int
    least: int
    prompt_words: int
    max_tokens: int

    def plan(self, workload: str, streams: int, seed: int) -> Plan:
        requests = max(self.waves * streams, -(-self.least // streams) * streams)
        return Plan(
            requests=requests,
            concurrency=streams,
            mix=WORKLOADS[workload],
            prompt_words=self.prompt_words,
            max_tokens=self.max_tokens,
            seed=seed,
        )


FULL = Load(streams=(1, 8, 32, 64), waves=2, least=8, prompt_words=60, max_tokens=64)
QUICK = Load(streams=(1, 4), waves=1, least=7, prompt_words=6, max_tokens=4)


@dataclass(slots=True)
class Recorder:
    """A client for the load test that decodes greedily, as PEFT does here, and keeps what was asked."""

    client: AsyncClient
    prompts: list[str] = field(default_factory=list)
    adapters: list[str | None] = field(default_factory=list)

    async def stream(self, prompt: Prompt, /, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """`AsyncClient.stream` at temperature 0."""
        self.prompts.append(str(prompt))
        self.adapters.append(options.get("adapter_id"))
        options["temperature"] = 0.0
        async with aclosing(self.client.stream(prompt, **options)) as chunks:
            async for chunk in chunks:
                yield chunk


@dataclass(slots=True)
class Measured:
    """One workload at one number of streams: a value a round."""

    workload: str
    streams: int
    server: list[float] = field(default_factory=list)
    peft: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "streams": self.streams,
            "tokens_per_s": statistics.median(self.server),
            "peft_tokens_per_s": statistics.median(self.peft) if self.peft else None,
            "ttft_ms_p50": statistics.median(self.ttft_ms),
            "itl_ms_p50": statistics.median(self.itl_ms),
            "rounds": {"tokens_per_s": self.server, "peft_tokens_per_s": self.peft},
        }


def main(
    out: options.Out = options.DEFAULT_OUT,
    quick: options.Quick = False,
    rounds: options.RoundsOption = 3,
    threads: options.Threads = 0,
    model: options.Model = options.DEFAULT_MODEL,
    data_dir: options.DataDir = options.DEFAULT_DATA_DIR,
    int8_activations: Annotated[bool, typer.Option("--int8-activations", help="The server's setting")] = False,
    adapter_dtype: Annotated[str, typer.Option(help="The server's setting")] = "auto",
) -> None:
    """Serve 1, 8, 32 and 64 streams of the base, of the base with LoRAs, and of the whole mix."""
    checkpoint = options.prepared(model, data_dir)
    options.use_threads(threads)
    effort = Effort(rounds=2, turn_s=0.001) if quick else Effort(rounds=rounds, turn_s=0.1)
    machine = describe(Limits(quick=quick), effort)
    report.show_machine(machine)
    load = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        adapters = {
            name: files.write(Path(folder) / name) for name, files in mixed_adapters(read_spec(checkpoint)).items()
        }
        peft = PeftBaseline(checkpoint, {name: adapters[name] for name in LORAS})
        flags = [f"--model={checkpoint}", f"--data-dir={folder}/data", "--port=0", "--grpc-port=0"]
        flags += [
            f"--threads={threads}",
            f"--adapter-dtype={adapter_dtype}",
            "--int8-activations" if int8_activations else "--no-int8-activations",
        ]
        with running_server(flags, Path(folder) / "server.log") as server:
            with Client(server.url) as client:
                for name, path in adapters.items():
                    client.adapters.push(name, path)
            measured = _measure(server, peft, load, effort.rounds)
            memory = _memory(server)
    ratios = _ratios(measured)
    _show(measured, ratios, memory)
    report.write_json(
        out / "serving.json",
        machine=machine,
        settings={
            "rounds": effort.rounds,
            "quick": quick,
            "prompt_words": load.prompt_words,
            "max_tokens": load.max_tokens,
            "waves": load.waves,
            "int8_activations": int8_activations,
            "adapter_dtype": adapter_dtype,
        },
        results={"loads": [entry.summary() for entry in measured], "ratios": ratios, "memory_bytes": memory},
    )
    _plot(measured, load, out)


def mixed_adapters(spec: ModelSpec) -> dict[str, AdapterFiles]:
    """Four LoRAs on all projections, a prefix, and a Houlsby bottleneck."""
    loras = {name: synthetic.lora(spec, rank, seed=rank) for name, rank in zip(LORAS, RANKS, strict=True)}
    return loras | {
        "prefix": synthetic.prefix(spec, PREFIX_TOKENS, seed=1),
        "bottleneck": synthetic.bottleneck(spec, BOTTLENECK_WIDTH, seed=2),
    }


def _measure(server: Server, peft: PeftBaseline, load: Load, rounds: int) -> list[Measured]:
    """In each round, for each number of streams: every workload on the server, then on PEFT where it can."""
    measured = {(w, s): Measured(w, s) for s in load.streams for w in WORKLOADS}
    _serve(server, load.plan("mix", max(load.streams), seed=-1))  # loads every adapter, starts every thread
    peft.tokens_per_s(["warm up"], [LORAS[0]], batch_size=1, max_tokens=2)
    for turn in range(rounds):
        for number, ((workload, streams), entry) in enumerate(measured.items()):
            # New prompts each time, or the prefix cache would answer.
            plan = load.plan(workload, streams, seed=turn * len(measured) + number)
            result, recorder = _serve(server, plan)
            entry.server.append(result.output_tokens_per_s)
            if result.overall.ttft_ms and result.overall.itl_ms:
                entry.ttft_ms.append(result.overall.ttft_ms.p50)
                entry.itl_ms.append(result.overall.itl_ms.p50)
            line = f"round {turn + 1}, {workload}, {streams} streams: {entry.server[-1]:.0f} tokens/s"
            if workload in PEFT_WORKLOADS:
                entry.peft.append(
                    peft.tokens_per_s(
                        recorder.prompts, recorder.adapters, batch_size=streams, max_tokens=load.max_tokens
                    )
                )
                line += f", PEFT {entry.peft[-1]:.0f}"
            report.progress.print(line)
    return list(measured.values())


def _serve(server: Server, plan: Plan) -> tuple[Report, Recorder]:
    async def go() -> tuple[Report, Recorder]:
        async with AsyncClient(server.url, retry=RetryPolicy(attempts=1)) as client:
            recorder = Recorder(client)
            return await run(recorder, plan), recorder

    result, recorder = uvloop.run(go())
    if result.errors or result.output_tokens != plan.requests * plan.max_tokens:
        raise RuntimeError(f"{result.output_tokens} tokens of {plan.requests * plan.max_tokens}: {result.errors}")
    return result, recorder


def _memory(server: Server) -> dict[str, int]:
    """Proportional set size of the server's processes after the load, bytes."""
    front = psutil.Process(server.pid)
    engine = next(child for child in front.children(recursive=True) if "peftserve.engine.process" in child.cmdline())
    sizes = {"front_end": front.memory_full_info().pss, "engine": engine.memory_full_info().pss}
    return sizes | {"total": sum(sizes.values())}


def _ratios(measured: Sequence[Measured]) -> list[dict[str, float]]:
    """By number of streams, each the median over rounds of the round's own ratio."""
    by = {(entry.workload, entry.streams): entry for entry in measured}
    return [
        {
            "streams": streams,
            "base_over_peft_base": median_ratio(by["base", streams].server, by["base", streams].peft),
            "loras_over_peft_loras": median_ratio(by["loras", streams].server, by["loras", streams].peft),
            "mix_over_peft_loras": median_ratio(by["mix", streams].server, by["loras", streams].peft),
            "loras_over_base": median_ratio(by["loras", streams].server, by["base", streams].server),
            "mix_over_base": median_ratio(by["mix", streams].server, by["base", streams].server),
        }
        for streams in dict.fromkeys(entry.streams for entry in measured)
    ]


def _show(measured: Sequence[Measured], ratios: Sequence[dict[str, float]], memory: dict[str, int]) -> None:
    rows = [
        [
            *(entry.workload, str(entry.streams), f"{statistics.median(entry.server):.1f}"),
            f"{statistics.median(entry.peft):.1f}" if entry.peft else "cannot",
            *(f"{statistics.median(entry.ttft_ms):.1f}", f"{statistics.median(entry.itl_ms):.2f}"),
        ]
        for entry in measured
    ]
    columns = ["workload", "streams", "tokens/s", "PEFT tokens/s", "TTFT p50 ms", "ITL p50 ms"]
    report.show_table("served end to end, output tokens/s", columns, rows)
    names = list(ratios[0])[1:]
    report.show_table(
        "ratios (within rounds); PEFT mixes LoRAs only, so the whole mix is held against its LoRA mix",
        ["streams", *(name.replace("_", " ") for name in names)],
        [[f"{entry['streams']:.0f}", *(f"{entry[name]:.2f}" for name in names)] for entry in ratios],
        labels=0,
    )
    sizes = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:.0f} MiB" for name, size in memory.items())
    report.console.print(f"resident after the load (PSS): {sizes}")


def _plot(measured: Sequence[Measured], load: Load, out: Path) -> None:
    lines = {}
    for workload in WORKLOADS:
        entries = [entry for entry in measured if entry.workload == workload]
        lines[f"peftserve, {workload}"] = (load.streams, [statistics.median(entry.server) for entry in entries])
        if workload in PEFT_WORKLOADS:
            lines[f"PEFT, {workload}"] = (load.streams, [statistics.median(entry.peft) for entry in entries])
    report.save_plot(
        out / "serving.png", lines, title="Served end to end", x_label="streams", y_label="output tokens/s"
    )


if __name__ == "__main__":
    typer.run(main)
