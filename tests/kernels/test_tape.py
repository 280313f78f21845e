"""Recorded native calls: the same results from new inputs, on memory that is reused but never under a live tensor."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peftserve_kernels import (
    Segments,
    bottleneck_add,
    embedding,
    lora_add,
    nf4_linear,
    prepare_nf4,
    residual_add,
    rms_norm,
    silu_mul,
)
from peftserve_kernels.capture import CaptureError, CaptureGuard
from peftserve_kernels.cpu.extension import HAS_NATIVE
from peftserve_kernels.cpu.tape import Tape, TapeMemory
from tests.kernels.native import ISAS, THREADS, isa, same_bits, threads
from tests.kernels.nf4_oracle import quantize
from tests.kernels.test_native_bottleneck import make_weights as make_bottleneck
from tests.kernels.test_native_lora import make_slices
from tests.kernels.test_native_lora import make_weights as make_lora

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the extension is not built")

WEIGHT = torch.rand(64) + 0.5


def network(stream: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        hidden = silu_mul(rms_norm(stream, WEIGHT, 1e-5, torch.bfloat16).repeat_interleave(1, 0))
        stream = residual_add(stream, torch.cat((hidden, hidden), 1), in_place=False)
    return stream


def layers(stream: torch.Tensor, count: int = 3) -> torch.Tensor:
    for _ in range(count):
        stream = residual_add(stream, rms_norm(stream, WEIGHT, 1e-5, torch.bfloat16), in_place=False)
    return stream


def test_a_replay_computes_on_the_new_inputs_for_any_number_of_tokens() -> None:
    x = torch.randn(5, 64)
    memory = TapeMemory()
    tape = Tape(memory)
    with tape.recording():
        y = memory.keep(layers(x))
    assert len(tape) == 6
    for tokens in (5, 1, 4, 5):
        x.normal_()
        expected = layers(x[:tokens])
        assert not torch.equal(y[:tokens], expected)
        before = y.clone()
        tape.replay(tokens)
        torch.testing.assert_close(y[:tokens], expected, rtol=0, atol=0)
        assert torch.equal(y[tokens:], before[tokens:]), "what is beyond the step stays as it is"


def test_what_is_sampled_has_a_size_of_its_own() -> None:
    x, rows = torch.randn(6, 64), torch.tensor([4, 1, 0])
    memory = TapeMemory()
    tape = Tape(memory)
    with tape.recording():
        stream = layers(x)
    with tape.recording(sampled=True):
        y = memory.keep(rms_norm(embedding(rows, stream), WEIGHT, 1e-5, torch.float32))
    tape.replay(5, sampled=2)
    expected = rms_norm(layers(x)[rows], WEIGHT, 1e-5, torch.float32)
    torch.testing.assert_close(y[:2], expected[:2], rtol=0, atol=0)
    tape.replay(5)  # nothing is sampled


def test_a_larger_step_than_the_recorded_one_is_refused() -> None:
    tape = Tape(TapeMemory())
    with tape.recording():
        layers(torch.randn(5, 64))
    for extent in ((6, 0, 0), (5, 1, 0), (5, 0, 1)):
        with pytest.raises(ValueError, match="recorded for smaller steps"):
            tape.replay(*extent)


def test_each_planned_op_has_a_plan_of_its_own() -> None:
    """A product makes the plans of the updates after it: here of several, and of others at the next step."""
    slices = make_slices(64, (96, 64))
    lora = make_lora([(3, 8), (17, 0), (0, 5)], slices, torch.bfloat16)
    weight = prepare_nf4(quantize(torch.randn(160, 64))[0])
    x, slot = torch.randn(40, 64).bfloat16(), torch.zeros(4, dtype=torch.int32)
    start = torch.zeros(5, dtype=torch.int32)

    def updates(x: torch.Tensor, segments: Segments) -> torch.Tensor:
        y = nf4_linear(x, weight)
        for layer in (0, 1, 0):
            lora_add(y, x, segments, lora, layer, slices)
        return y

    memory = TapeMemory()
    tape = Tape(memory)
    with tape.recording():
        y = memory.keep(updates(x, Segments(start, slot, (), torch.empty((0, 3), dtype=torch.int32))))
    for starts, slots in (
        ((0, 1, 3, 30, 40), (0, 1, 2, 0)),
        ((0, 2, 2, 3, 5), (2, 1, 0, 1)),
        ((0, 1, 1, 1, 1), (1,) * 4),
    ):
        x.normal_()
        start.copy_(torch.tensor(starts))
        slot.copy_(torch.tensor(slots))
        tape.replay(starts[-1], sequences=4)
        expected = updates(x[: starts[-1]], Segments.build(starts, slots))
        torch.testing.assert_close(y[: starts[-1]], expected, rtol=0, atol=0)


def test_other_threads_compute_while_one_records() -> None:
    """As loaders do, while the first step with a kind of adapter is recorded."""
    x = torch.randn(5, 64)
    expected = layers(x)
    tape = Tape(TapeMemory())
    with ThreadPoolExecutor(1) as pool, tape.recording():
        layers(x, 1)
        computed = pool.submit(layers, x).result()
    assert len(tape) == 2
    assert torch.equal(computed, expected)
    assert torch.equal(layers(x), expected)


def test_a_plan_is_made_anew_where_a_layer_or_a_step_has_other_ranks() -> None:
    """Else its parts are kept: of a layer with the same ranks, of the next step of the same adapters."""
    slices = make_slices(64, (96, 64))
    lora = make_lora([(16, 8), (0, 16), (9, 9)], slices, torch.bfloat16)
    bottleneck = make_bottleneck([(16, 8), (0, 16), (9, 9)], 160, torch.bfloat16)
    weight = prepare_nf4(quantize(torch.randn(160, 64))[0])
    x, stream = torch.randn(40, 64).bfloat16(), torch.randn(40, 160)
    start, slot = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)

    def updates(x: torch.Tensor, segments: Segments) -> torch.Tensor:
        y = nf4_linear(x, weight)
        after = residual_add(stream[: len(x)], y, in_place=False)
        for layer in (0, 1, 0, 1, 1):
            y = nf4_linear(x, weight)
            lora_add(y, x, segments, lora, layer, slices)
            for site in (0, 1):
                bottleneck_add(after, y, stream[: len(x)], segments, bottleneck, layer, site)
            after = residual_add(after, y, in_place=False)
        return after

    memory = TapeMemory()
    tape = Tape(memory)
    with tape.recording():
        result = memory.keep(updates(x, Segments(start, slot, (), torch.empty((0, 3), dtype=torch.int32))))
    starts, slots = (0, 1, 3, 40), (2, 0, 1)
    start.copy_(torch.tensor(starts))
    slot.copy_(torch.tensor(slots))
    steps = ((0, 0, 0, 16), (0, 1, 0, 16), (0, 1, 0, 3), (2, 1, 1, 0), (2, 0, 1, 5), (2, 0, 1, 5), (1, 0, 1, 11))
    for changed_slot, layer, target, rank in steps:
        lora.rank[changed_slot, layer, target] = rank
        bottleneck.width[changed_slot, layer, target] = rank
        tape.replay(40, sequences=3)
        assert result.isfinite().all()
        assert same_bits(result, updates(x, Segments.build(starts, slots))), (changed_slot, layer, target, rank)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("outputs", [(96, 64), (512, 128)])
def test_updates_that_a_product_goes_on_with_have_the_bits_of_separate_calls(
    isa_name: str, outputs: tuple[int, int]
) -> None:
    """The products are of all ways to split one, the updates of more parts and of fewer than there are threads."""
    columns = 576
    slices = make_slices(columns, outputs)
    lora = make_lora([(3, 8), (64, 17), (0, 1), (0, 0)], slices, torch.bfloat16)
    bottleneck = make_bottleneck([(5, 0), (0, 64), (0, 0), (96, 1)], sum(outputs), torch.bfloat16)
    weight = prepare_nf4(quantize(torch.randn(sum(outputs), columns))[0])
    x, stream = torch.randn(300, columns).bfloat16(), torch.randn(300, sum(outputs))
    start, slot = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)

    def run(rows: int, segments: Segments) -> tuple[torch.Tensor, ...]:
        results = []
        for layer in (0, 1):
            y = nf4_linear(x[:rows], weight)
            lora_add(y, x[:rows], segments, lora, layer, slices)
            after = residual_add(stream[:rows], y, in_place=False)
            bottleneck_add(after, y, stream[:rows], segments, bottleneck, layer, layer)
            results += [y, after]
        return tuple(results)

    with isa(isa_name):
        expected = {}
        for starts in ((0, 0, 1, 1, 1), (0, 2, 5, 6, 8), (0, 1, 30, 30, 40), (0, 100, 270, 280, 300)):
            for slots in ((1, 0, 3, 2), (2, 1, 0, 3), (3, 3, 2, 2)):
                with threads(1):
                    expected[starts, slots] = run(starts[-1], Segments.build(starts, slots))
        for count in THREADS:
            memory = TapeMemory()
            tape = Tape(memory)
            with threads(count), tape.recording():
                segments = Segments(start, slot, (), torch.empty((0, 3), dtype=torch.int32))
                results = [memory.keep(result) for result in run(300, segments)]
            for (starts, slots), wanted in expected.items():
                start.copy_(torch.tensor(starts))
                slot.copy_(torch.tensor(slots))
                tape.replay(starts[-1], sequences=4)
                for result, want in zip(results, wanted, strict=True):
                    assert same_bits(result[: starts[-1]], want), f"{starts}, {slots}, {count} threads"


def test_memory_is_used_again_within_a_tape_and_between_tapes() -> None:
    memory = TapeMemory()
    sizes = []
    for count in (3, 30):
        with Tape(memory).recording():
            memory.keep(layers(torch.randn(5, 64), count))
        gc.collect()
        sizes.append(memory.nbytes)
    assert sizes[0] == sizes[1] < 4 * 4 * 5 * 64 + 4096


def test_steps_of_all_sizes_take_little_more_than_the_largest() -> None:
    memories = TapeMemory(), TapeMemory()
    for memory, sizes in zip(memories, ((256,), range(1, 257)), strict=True):
        for rows in sizes:
            with Tape(memory).recording():
                memory.keep(layers(torch.randn(rows, 64)))
    largest, everything = (memory.nbytes for memory in memories)
    assert everything < 1.5 * largest


def test_results_fill_holes_and_neighbouring_holes_become_one() -> None:
    memory = TapeMemory()
    a, b, c, d = (memory.empty((size,), torch.uint8) for size in (64, 1000, 64, 64))
    place_of_b, place_of_d = b.data_ptr(), d.data_ptr()
    assert a.data_ptr() < place_of_b < c.data_ptr() < place_of_d
    del b
    assert memory.empty((3000,), torch.uint8).data_ptr() > place_of_d, "the hole is too small"
    del c
    assert memory.empty((1800,), torch.uint8).data_ptr() == place_of_b, "two holes are one"


def test_a_result_of_any_size_has_a_place() -> None:
    memory = TapeMemory()
    small, large = memory.empty((5,), torch.uint8), memory.empty((65 << 20,), torch.uint8)
    large[-1] = 7
    for x in (small, large):
        assert memory.keep(x).data_ptr() == x.data_ptr()
        assert memory.keep(x).shape == x.shape
    assert memory.keep(memory.empty((0, 3), torch.float32)).shape == (0, 3)


def test_a_live_view_keeps_its_place() -> None:
    memory = TapeMemory()
    with Tape(memory).recording():
        view = rms_norm(torch.randn(4, 64), WEIGHT, 1e-5, torch.float32)[1:3]
        other = rms_norm(torch.randn(4, 64), WEIGHT, 1e-5, torch.float32)
    assert other.data_ptr() >= view.data_ptr() + view.nbytes


def test_one_tape_at_a_time_and_an_exception_ends_it() -> None:
    tape = Tape(TapeMemory())
    with tape.recording(), pytest.raises(RuntimeError, match="recorded already"), Tape(TapeMemory()).recording():
        pass
    with pytest.raises(KeyError), tape.recording():
        raise KeyError
    with tape.recording():
        rms_norm(torch.randn(1, 64), WEIGHT, 1e-5, torch.float32)
    assert len(tape) == 1


def test_an_empty_result_has_a_block_too() -> None:
    memory = TapeMemory()
    with Tape(memory).recording():
        assert memory.keep(rms_norm(torch.randn(0, 64), WEIGHT, 1e-5, torch.float32)).shape == (0, 64)


def test_the_guard_refuses_what_a_tape_would_miss() -> None:
    with Tape(TapeMemory()).recording(), CaptureGuard(computes=False):
        layers(torch.empty(5, 64))
    with pytest.raises(CaptureError, match="is computed by torch"), CaptureGuard(computes=False):
        network(torch.empty(5, 64))
    x = torch.ones(3)
    for planted in (lambda: x.add_(1), lambda: x.bfloat16(), lambda: x.copy_(x), lambda: x[[0, 2]]):
        with pytest.raises(CaptureError), CaptureGuard(computes=False):
            planted()
    with CaptureGuard(computes=False):
        assert x.float().contiguous().view(3, 1)[1:].shape == (2, 1)


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x.to("meta"),
        lambda x: x.unique(),
    ],
)
def test_the_guard_refuses_what_no_replay_can_repeat(planted) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CaptureError), CaptureGuard():
        planted(torch.tensor([1.0, -1.0, 2.0]))


def test_the_guard_lets_computation_through() -> None:
    x = torch.randn(4, 4)
    with CaptureGuard():
        y = torch.softmax(x @ x.t(), -1)[:, 1:].contiguous() * 2
    assert y.shape == (4, 3)
