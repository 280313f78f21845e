"""Captured decode steps give what the same steps give op by op, to the bit, for any mix of adapters."""

from pathlib import Path

import pytest
import torch

from peftserve.engine.plan import Row, SampleSpec, StepPlan, segments
from peftserve.model import graphs
from peftserve.model.batch import Batch, build_batch
from peftserve.model.graphs import TapeGraphs, graph_sizes, is_decode, size_for
from peftserve.model.static_batch import StaticBatch
from peftserve.types import AdapterKind
from peftserve_kernels.capture import CaptureError, CaptureGuard
from peftserve_kernels.cpu.extension import HAS_NATIVE
from tests.model.driver import GREEDY, Driver, Job

native = pytest.mark.skipif(not HAS_NATIVE, reason="the extension is not built")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jobs(driver: Driver, every_kind: list[Path]) -> list[Job]:
    placed = [None, *(driver.add(adapter) for adapter in every_kind)]
    # Of different lengths, so that every number of rows and every mix of kinds comes up, and some come again.
    return [Job(list(range(3, 9 + i)), 2 + 3 * i, adapter=placed[i % len(placed)]) for i in range(9)]


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_steps_equal_steps_run_op_by_op(
    base_folder: Path, every_kind: list[Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    results = []
    for name, max_rows in (("eager", 0), ("replayed", 64)):
        driver = Driver(base_folder, dtype=dtype, store=tmp_path / name, max_rows=max_rows)
        run = jobs(driver, every_kind)
        driver.run(*run)
        results.append([[(pick.token_id, pick.logprobs) for pick in job.sampled] for job in run])
        driver.close()
    assert results[0] == results[1]


def plan(rows: list[Row]) -> StepPlan:
    return StepPlan(1, tuple(rows), (), segments(rows, AdapterKind.LORA), segments(rows, AdapterKind.BOTTLENECK))


def row(name: str, kind: AdapterKind, slot: int, computed: int, table: list[int], tokens: int = 1) -> Row:
    return Row(name, kind, slot, [7 + computed] * tokens, computed, table, SampleSpec(GREEDY, 0, 0))


def test_only_single_tokens_that_are_sampled_are_a_decode_step() -> None:
    base = AdapterKind.BASE
    assert is_decode(plan([row("a", base, 0, 3, [1]), row("b", base, 0, 0, [2])]))
    assert not is_decode(plan([row("a", base, 0, 3, [1]), row("b", base, 0, 0, [2], tokens=2)]))
    assert not is_decode(plan([Row("a", base, 0, [7], 3, [1], None)]))


def same(a: Batch, b: Batch, tokens: int) -> None:
    for name in ("token_ids", "positions", "slots"):
        assert torch.equal(getattr(a, name)[:tokens], getattr(b, name)), name
    assert torch.equal(a.attention.context_len[: len(b.attention.context_len)], b.attention.context_len)
    for index, context in enumerate(b.attention.context_len.tolist()):
        pages = -(-context // 4)  # nothing is read beyond them
        assert torch.equal(a.attention.block_tables[index, :pages], b.attention.block_tables[index, :pages])
    for kind in ("lora", "bottleneck"):
        x, y = getattr(a, kind), getattr(b, kind)
        assert (x is None) == (y is None)
        if x is not None:
            assert torch.equal(x.start[: len(y) + 1], y.start)
            assert torch.equal(x.slot[: len(y)], y.slot)
            assert bool((x.start[len(y) :] == y.start[-1]).all()), "segments that are not there are empty"
            assert torch.equal(x.tiles[: len(y.tiles)], y.tiles)
            assert not bool(x.tiles[len(y.tiles) :].any())


def test_static_inputs_are_those_of_the_step_and_padding_touches_nothing() -> None:
    inputs = StaticBatch(max_tokens=8, max_rows=8, max_context=32, page_size=4, device=CPU)
    table = [3, 9]
    first = [
        row("a", AdapterKind.BASE, 0, 6, table),
        row("b", AdapterKind.LORA, 2, 1, [4]),
        row("c", AdapterKind.LORA, 2, 0, [5]),
        row("d", AdapterKind.LORA, 5, 11, [6, 7, 8]),
        row("e", AdapterKind.BOTTLENECK, 1, 4, [1, 2]),
    ]
    table_of_b = first[1].block_table
    steps = [first, [first[0], *first[3:]], [row("a", AdapterKind.BASE, 0, 8, table), first[1]]]
    for index, rows in enumerate(steps):
        if index == 2:
            table.append(10)  # grown in place, as the scheduler grows it
        step = plan(rows)
        assert inputs.load(step, 8) == len(rows)
        expected = build_batch(step, 4, CPU)
        static = inputs.decode_view(8, lora=bool(step.lora.slot), bottleneck=bool(step.bottleneck.slot))
        same(static, expected, len(rows))
        assert static.attention.query_start.tolist() == list(range(9))
        assert bool((static.slots[len(rows) :] == -1).all())
        assert not bool(static.attention.context_len[len(rows) :].any())
    # Another request's table in the same place, as long and as full.
    assert table_of_b == [4]
    replaced = plan([row("a", AdapterKind.BASE, 0, 8, [20, 21, 22])])
    inputs.load(replaced)
    same(inputs.decode_view(1, lora=False, bottleneck=False), build_batch(replaced, 4, CPU), 1)


def test_static_inputs_hold_prompts_and_rows_that_do_not_sample() -> None:
    inputs = StaticBatch(max_tokens=40, max_rows=4, max_context=32, page_size=4, device=CPU)
    rows = [
        row("a", AdapterKind.BASE, 0, 6, [3, 9]),
        Row("b", AdapterKind.LORA, 2, list(range(20)), 3, [4, 5, 6, 7, 8, 10], None),
        row("c", AdapterKind.LORA, 3, 0, [11], tokens=4),
    ]
    for some in (rows, rows[1:], rows[:2]):
        step = plan(some)
        assert inputs.holds(step)
        assert inputs.load(step) == sum(row.sample is not None for row in some)
        static, expected = inputs.view(lora=True, bottleneck=False), build_batch(step, 4, CPU)
        same(static, expected, step.num_tokens)
        assert torch.equal(static.attention.query_start[: len(some) + 1], expected.attention.query_start)
        assert static.sample_rows is not None
        assert expected.sample_rows is not None
        assert torch.equal(static.sample_rows[: len(expected.sample_rows)], expected.sample_rows)
    assert not inputs.holds(plan([row("a", AdapterKind.BASE, 0, 0, [3], tokens=41)]))
    assert not inputs.holds(plan([row("a", AdapterKind.BASE, 0, 6, [3, 9])] * 5))


def test_graph_sizes() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(30) == (1, 2, 4, 8, 12, 16, 20, 24, 28, 30)
    assert graph_sizes(4096)[-1] == 256
    sizes = graph_sizes(30)
    assert [size_for(rows, sizes) for rows in (1, 3, 29, 30, 31)] == [1, 4, 30, 30, None]


def test_without_the_extension_nothing_is_captured(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Driver(base_folder).runner._decoder
    sizes = {"max_tokens": 8, "max_rows": 2, "max_context": 8, "page_size": 4}
    monkeypatch.setattr(graphs, "HAS_NATIVE", False)
    assert graphs.make_graphs(decoder, CPU, **sizes) is None


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tape_would_miss_nothing(
    base_folder: Path, every_kind: list[Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    """The guard passes over every recorded step, and finds an op of torch's that is planted in the decoder."""
    driver = Driver(base_folder, dtype=dtype, store=tmp_path / "store")
    decoder = driver.runner._decoder
    inputs = StaticBatch(max_tokens=16, max_rows=8, max_context=64, page_size=4, device=CPU)
    every = plan(
        [
            row("a", AdapterKind.BASE, 0, 6, [3, 9]),
            row("b", AdapterKind.LORA, driver.add(every_kind[0]).placement.slot, 1, [4]),
            row("c", AdapterKind.BOTTLENECK, driver.add(every_kind[3]).placement.slot, 4, [1, 2]),
        ]
    )
    with torch.inference_mode(), CaptureGuard(computes=False):
        assert TapeGraphs(decoder, inputs).run(every).shape == (3, driver.spec.vocab_size)

    class Planted:
        forward = staticmethod(decoder.forward)
        step = staticmethod(decoder.step)

        def logits(self, stream: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
            logits = decoder.logits(stream, rows)
            return logits + logits.max().item()

    with torch.inference_mode(), pytest.raises(CaptureError), CaptureGuard(computes=False):
        TapeGraphs(Planted(), inputs).run(every)
    driver.close()
