"""For whoever has a card: are the GPU kernels right, how fast are they, and what does the server make of them?

Usage: python bench/gpu_check.py [--out FOLDER] [--rounds N] [--device cuda]

First every op is compared with its torch reference on the card. Then each is timed with CUDA events, operands rotating
so that they come from memory, against its rivals: bitsandbytes' `matmul_4bit` and a dense bf16 product for linear
layers, a loop over adapters as PEFT has it for LoRA, the reference for the rest, and the card's own read bandwidth
(measured in the same run). Last a server is started on the card and loaded with the mix of all kinds of adapter.
`--device cpu --quick` runs the same code on tiny sizes under Triton's interpreter: it shows that the script works.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import options
import report
from measure import Call, Effort, interleave, rotating
from nf4_cases import Case, copies_for, layer_shapes
from op_cases import OpCases
from ops import SMOLLM2
from peftserve.model.spec import ModelSpec
from peftserve_kernels import NF4_BLOCK, Nf4Weight, dequantize_nf4, nf4_linear, prepare_nf4
from peftserve_kernels.dispatch import Backend, backend_for

LLAMA_8B = ModelSpec(
    name="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
)
_TINY = ModelSpec(
    name="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=96,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
_TOKENS = (1, 8, 16, 32, 64, 512, 2048)
_READ_BYTES = 1 << 30
_Measure = Callable[[Mapping[str, Call]], Mapping[str, Sequence[float]]]
_TOLERANCE = 0.02  # of the norm: bf16 levels, bf16 results


def main(
    out: options.Out = options.DEFAULT_OUT,
    quick: options.Quick = False,
    rounds: options.RoundsOption = 9,
    device: Annotated[str, typer.Option(help="cuda, or cpu with TRITON_INTERPRET=1 and --quick")] = "cuda",
) -> None:
    """Check, time and serve; prints one table, writes gpu.json."""
    if device == "cuda" and not torch.cuda.is_available():
        report.console.print("no CUDA device is usable here: nothing was checked, nothing was measured")
        raise typer.Exit(2)
    torch.set_default_device(device)
    if backend_for(torch.get_default_device()) is not Backend.TRITON:
        raise typer.BadParameter("the Triton backend is not chosen here: set PEFTSERVE_KERNELS=triton")
    torch.manual_seed(0)
    effort = Effort(rounds, turn_s=1e-4 if quick else 5e-3)
    measure = partial(interleave, effort=effort, timer=_card_time if device == "cuda" else None)
    bandwidth = _read_bandwidth(measure, quick=quick)
    rows = []
    for name, spec in (("tiny", _TINY),) if quick else (("SmolLM2-135M", SMOLLM2), ("Llama-3.1-8B", LLAMA_8B)):
        for case in _cases(spec, quick=quick):
            report.progress.print(f"{name}: {case.op} {case.shape}, M = {case.tokens}")
            rows.append(_measured(name, case, measure, bandwidth))
    _show(rows, bandwidth)
    served = _serve_mix() if device == "cuda" else None
    report.write_json(
        out / "gpu.json",
        machine={
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, interpreted",
            "read_bytes_per_s": bandwidth,
        },
        settings={"rounds": rounds, "quick": quick},
        results={"ops": rows, "served": served},
    )
    wrong = [row for row in rows if row["error"] is not None and row["error"] > _TOLERANCE]
    for row in wrong:
        report.console.print(
            f"WRONG: {row['model']} {row['op']} {row['shape']} M = {row['tokens']}: {row['error']:.3g}"
        )
    if wrong:
        raise typer.Exit(1)


def _card_time(call: Call, count: int) -> float:
    """Seconds a call between CUDA events, after one call that pays for what came before."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def _read_bandwidth(measure: _Measure, *, quick: bool) -> float:
    memory = torch.ones((1 << 16 if quick else _READ_BYTES) // 4)
    return memory.nbytes / statistics.median(measure({"read": memory.sum})["read"])


def _cases(spec: ModelSpec, *, quick: bool) -> Iterator[Case]:
    token_counts = (1, 3) if quick else _TOKENS
    for name, rows, columns in layer_shapes(spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size):
        layer = _Layer(f"{name} {rows}x{columns}", rows, columns, quick=quick)
        for tokens in token_counts:
            yield layer.case(tokens)
    ops = OpCases(spec, (16,) if quick else (1024,), quick=quick)
    for tokens in token_counts:
        yield from ops.at(tokens)


class _Layer:
    """A random NF4 layer as we hold it, as bitsandbytes does, and dense."""

    def __init__(self, name: str, rows: int, columns: int, *, quick: bool) -> None:
        from bitsandbytes.functional import quantize_4bit

        self.name, self.rows, self.columns = name, rows, columns
        values = (torch.randn(rows, columns) * columns**-0.5).bfloat16()
        packed, state = quantize_4bit(values, blocksize=NF4_BLOCK, quant_type="nf4")
        weight = Nf4Weight(packed.view(rows, columns // 2), state.absmax.float().view(rows, columns // NF4_BLOCK))
        count = copies_for(weight.nbytes, quick=quick)
        self._ours = [prepare_nf4(Nf4Weight(weight.packed.clone(), weight.absmax.clone())) for _ in range(count)]
        self._bnb = [(packed.clone().t(), state) for _ in range(count)]
        dense = dequantize_nf4(weight, torch.bfloat16)
        self._dense = [dense.clone().t() for _ in range(copies_for(dense.nbytes, quick=quick))]

    def case(self, tokens: int) -> Case:
        from bitsandbytes import matmul_4bit

        x = torch.randn(tokens, self.columns).bfloat16()
        variants: dict[str, Call] = {
            "ours": rotating(self._ours, lambda weight: nf4_linear(x, weight)),
            "reference": rotating(self._dense[:1], lambda weight: torch.mm(x.float(), weight.float())),
            "bnb": rotating(self._bnb, lambda weight: matmul_4bit(x, weight[0], quant_state=weight[1])),
            "dense": rotating(self._dense, lambda weight: torch.mm(x, weight)),
        }
        return Case(
            op="nf4_linear",
            shape=self.name,
            tokens=tokens,
            variants=variants,
            nbytes=self._ours[0].nbytes + x.nbytes + 2 * tokens * self.rows,
            flops=2 * tokens * self.rows * self.columns,
        )


def _measured(model: str, case: Case, measure: _Measure, bandwidth: float) -> dict[str, Any]:
    error = _error(case.variants["ours"], case.variants["reference"])
    seconds = measure(case.variants)
    ours = statistics.median(seconds["ours"])
    return {
        "model": model,
        "op": case.op,
        "shape": case.shape,
        "tokens": case.tokens,
        "error": error,
        "us": {name: statistics.median(values) * 1e6 for name, values in seconds.items()},
        "of_read_bandwidth": case.nbytes / bandwidth / ours,
    }


def _error(ours: Callable[[], object], reference: Callable[[], object]) -> float | None:
    """Relative, in norm, of what two calls return; None for ops that write in place (the tests compare those)."""
    a, b = ours(), reference()
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.is_floating_point():
        return None
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9))


def _show(rows: Sequence[Mapping[str, Any]], bandwidth: float) -> None:
    names = ("ours", "bnb", "dense", "peft_loop", "reference")
    table = [
        [
            *(str(row[key]) for key in ("model", "op", "shape", "tokens")),
            *(f"{row['us'][name]:,.1f}" if name in row["us"] else "" for name in names),
            f"{row['of_read_bandwidth']:.0%}",
            "" if row["error"] is None else f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    columns = ["model", "op", "case", "M", *(f"{name.replace('_', ' ')} µs" for name in names), "of read", "error"]
    report.show_table(f"ops on this device; it reads {bandwidth / 1e9:,.0f} GB/s", columns, table, labels=3)


def _serve_mix() -> dict[str, float]:
    """Output tokens/s of the embedded model with every kind of adapter at 1, 8, 32 and 64 streams."""
    import serving
    from peftserve.demo.child import running_server
    from peftserve.model.config_reader import read_spec
    from peftserve_client import Client

    checkpoint = options.prepared(options.DEFAULT_MODEL, options.DEFAULT_DATA_DIR)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        adapters = serving.mixed_adapters(read_spec(checkpoint))
        flags = [f"--model={checkpoint}", f"--data-dir={folder}/data", "--port=0", "--grpc-port=0", "--device=cuda"]
        with running_server(flags, Path(folder) / "server.log") as server:
            with Client(server.url) as client:
                for name, files in adapters.items():
                    client.adapters.push(name, files.write(Path(folder) / name))
            for workload in ("base", "mix"):
                for streams in serving.FULL.streams:
                    result, _ = serving._serve(server, serving.FULL.plan(workload, streams, seed=streams))
                    found[f"{workload}, {streams} streams"] = result.output_tokens_per_s
    report.show_table("served, output tokens/s", ["load", "tokens/s"], [[k, f"{v:.0f}"] for k, v in found.items()])
    return found


if __name__ == "__main__":
    typer.run(main)
