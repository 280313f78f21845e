"""The model on its Triton kernels, without a GPU: interpreted beside the CPU path, and recorded as for a graph."""

import dataclasses
import importlib
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import peftserve_kernels
from peftserve.engine.plan import Row, SampleSpec, StepPlan, segments
from peftserve.model.batch import Batch
from peftserve.model.decoder import Decoder
from peftserve.model.kv import KvCache
from peftserve.model.static_batch import StaticBatch
from peftserve.types import AdapterKind, SamplingParams
from peftserve_kernels import dispatch
from peftserve_kernels.capture import CaptureError, CaptureGuard
from peftserve_kernels.dispatch import Backend
from peftserve_kernels.gpu.launch import TARGETS, Launch, recording, watching
from tests.model.driver import GREEDY, Driver, Job

META = torch.device("meta")


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op on its Triton kernel; a torch reference or a native op that ran instead would raise."""
    monkeypatch.setattr(dispatch, "forced_backend", lambda: Backend.TRITON)
    for name in op_modules():
        module = importlib.import_module(f"peftserve_kernels.{name}")
        only = {Backend.TRITON: module._IMPLEMENTATIONS[Backend.TRITON], Backend.REFERENCE: _refuse}
        monkeypatch.setattr(module, "_IMPLEMENTATIONS", only)


def _refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("a torch reference ran on the Triton path")


def op_modules() -> list[str]:
    names = [info.name for info in pkgutil.iter_modules(peftserve_kernels.__path__)]
    return [n for n in names if hasattr(importlib.import_module(f"peftserve_kernels.{n}"), "_IMPLEMENTATIONS")]


def jobs(driver: Driver, every_kind: list[Path]) -> list[Job]:
    """Every kind, of different lengths: some prompts are still in chunks while others decode, one row has penalties."""
    placed = [None, *(driver.add(adapter) for adapter in every_kind)]
    penalties = SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, presence_penalty=0.5, logprobs=20)
    found = [Job(list(range(3, 8 + 3 * i)), 4, adapter=adapter, chunks=(2, 5)) for i, adapter in enumerate(placed)]
    return [*found, Job([5, 9, 11], 4, adapter=placed[1], params=penalties)]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.int8])
def test_all_kinds_in_one_batch_give_the_tokens_of_the_cpu_path(
    adapter_dtype: torch.dtype,
    base_folder: Path,
    every_kind: list[Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    def run(name: str) -> list[Job]:
        driver = Driver(base_folder, store=tmp_path / name, adapter_dtype=adapter_dtype)
        found = jobs(driver, every_kind)
        driver.run(*found)
        driver.close()
        return found

    expected = run("cpu")
    request.getfixturevalue("on_triton")
    with watching() as launches:
        found = run("triton")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        for a, b in zip(ours.sampled, theirs.sampled, strict=True):
            assert a.logprobs is not None
            assert b.logprobs is not None
            assert dict(a.logprobs.top[:5]) == pytest.approx(dict(b.logprobs.top[:5]), abs=1e-3)
    # Every op of a step came from its own kernel file.
    assert {launch.kernel.fn.__module__.rpartition(".")[2] for launch in launches} >= {
        *("nf4_linear", "lora", "bottleneck", "rope", "elementwise", "linear", "sample", "penalties"),
    }
    assert any("attention" in launch.kernel.fn.__module__ for launch in launches)


def test_every_op_has_a_triton_kernel() -> None:
    for name in op_modules():
        module = importlib.import_module(f"peftserve_kernels.{name}")
        assert Backend.TRITON in module._IMPLEMENTATIONS, name


class Meta:
    """The decoder and its inputs without data: whatever would look at a value has none to look at."""

    def __init__(self, base_folder: Path, rows: int) -> None:
        driver = Driver(base_folder)
        spec = self.spec = driver.spec
        decoder = driver.runner._decoder
        caches = KvCache(spec, num_pages=8, page_size=4, dtype=torch.bfloat16, device=META).layers
        self.rows = rows
        self.decoder = Decoder(
            to_meta(decoder._weights),
            spec,
            max_context=32,
            caches=caches,
            lora=to_meta(driver.memory.lora),
            bottleneck=to_meta(driver.memory.bottleneck),
        )
        self.inputs = StaticBatch(max_tokens=rows, max_rows=rows, max_context=32, page_size=4, device=META)

    def batch(self) -> Batch:
        return self.inputs.decode_view(self.rows, lora=True, bottleneck=True)


def to_meta(x: Any) -> Any:
    """A dataclass of tensors (or of tuples and dataclasses of such) with every tensor on the meta device, in bf16."""
    if isinstance(x, torch.Tensor):
        return x.to(META, torch.bfloat16 if x.ndim == 2 and x.dtype == torch.float32 else x.dtype)
    if isinstance(x, tuple):
        return tuple(to_meta(item) for item in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}
        if "absmax" in fields:
            return dataclasses.replace(x, packed=x.packed.to(META), absmax=x.absmax.to(META))
        return dataclasses.replace(x, **{name: to_meta(value) for name, value in fields.items()})
    return x


def signature(launch: Launch) -> tuple[object, ...]:
    scalars = tuple(x for x in launch.arguments if not isinstance(x, torch.Tensor))
    return launch.name, launch.grid, scalars, tuple(launch.constants.items()), launch.num_warps, launch.num_stages


@pytest.mark.parametrize("target", TARGETS[:3], ids=str)
def test_a_decode_step_can_be_captured(base_folder: Path, target: Any) -> None:
    """Nothing is read on the host, no size depends on data, and the launches are the same for every mix of requests."""
    meta = Meta(base_folder, rows=6)
    runs = []
    for rows in (
        [Row("a", AdapterKind.BASE, 0, [5], 3, [1], SampleSpec(GREEDY, 0, 0))],
        [
            Row("a", AdapterKind.LORA, 0, [5], 9, [1, 2, 3], SampleSpec(GREEDY, 0, 0)),
            Row("b", AdapterKind.LORA, 3, [7], 2, [4], SampleSpec(GREEDY, 0, 0)),
            Row("c", AdapterKind.BOTTLENECK, 2, [9], 30, list(range(8)), SampleSpec(GREEDY, 0, 0)),
        ],
    ):
        found = tuple(rows)
        plan = StepPlan(1, found, (), segments(found, AdapterKind.LORA), segments(found, AdapterKind.BOTTLENECK))
        meta.inputs.load(plan, meta.rows)
        batch = meta.batch()
        with torch.inference_mode(), recording(target) as launches, CaptureGuard():
            logits = meta.decoder.step(batch)
        assert (logits.shape, logits.device.type) == ((6, meta.spec.vocab_size), "meta")
        runs.append([signature(launch) for launch in launches])
    assert runs[0] == runs[1]
    layers = meta.spec.num_layers
    counts = Counter(name for name, *_ in runs[0])
    assert counts["rms_norm_kernel"] == 2 * layers + 1
    assert counts["residual_add_kernel"] == 2 * layers
    assert counts["silu_mul_kernel"] == layers
    assert counts["embedding_kernel"] == 2


@pytest.mark.parametrize(
    "planted",
    [
        lambda logits: logits * logits.max().item(),
        lambda logits: logits[logits.sum(1) > 0],
        lambda logits: logits + torch.tensor([1.0]),
        lambda logits: logits.cpu(),
    ],
    ids=["item", "mask", "host tensor", "copy"],
)
def test_the_guard_finds_what_is_planted(base_folder: Path, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = Meta(base_folder, rows=2)
    honest = meta.decoder.logits
    monkeypatch.setattr(meta.decoder, "logits", lambda stream, rows: planted(honest(stream, rows)))
    batch = meta.batch()
    with torch.inference_mode(), recording(TARGETS[1]), CaptureGuard(), pytest.raises(CaptureError):
        meta.decoder.step(batch)
