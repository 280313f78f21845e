"""bottleneck_add in Triton, under its interpreter, and how it is launched."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peftserve_kernels import Activation, Backend, BottleneckWeights, Segments
from peftserve_kernels import bottleneck as op
from peftserve_kernels.activation import activate
from peftserve_kernels.gpu import activation as gpu_activation
from peftserve_kernels.gpu import bottleneck as gpu
from peftserve_kernels.gpu.launch import TARGETS, Target, recording, watching
from peftserve_kernels.gpu.low_rank import Choice, Tuning
from tests.kernels.interpreter import rows_alike
from tests.kernels.native import same_bits
from tests.kernels.test_native_bottleneck import activations, make_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARENAS = [*DTYPES, torch.int8]
CUDA = [target for target in TARGETS if target.backend == "cuda"]
FAR = 1 << 50  # an offset that nobody may follow


def make_case(widths: list[tuple[int, int]], columns: int, dtype: torch.dtype) -> BottleneckWeights:
    """Pages that are not in use, and biases of sites without an adapter, lie nowhere."""
    weights = make_weights(widths, columns, dtype)
    for table in (weights.down_page, weights.up_page):
        used = -(-weights.width.long() // 8)
        table[torch.arange(table.shape[-1]) >= used[..., None]] = FAR
    for table in (weights.down_bias, weights.up_bias):
        table[weights.width == 0] = FAR
    return weights


def check(
    segments: Segments, tokens: int, weights: BottleneckWeights, columns: int, dtype: torch.dtype, site: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Against the reference; stream before, hidden, residual and stream after."""
    before, hidden, residual = activations(tokens, columns, dtype)
    actual, expected = before.clone(), before.clone()
    op.bottleneck_add_reference(expected, hidden, residual, segments, weights, 1, site)
    gpu.bottleneck_add(actual, hidden, residual, segments, weights, 1, site)
    # with weights of bfloat16 and of 8 bits, the inputs of both products keep 16 bits
    is_short = weights.arena.dtype in (torch.bfloat16, torch.int8)
    assert_close(actual, expected, rtol=1e-5, atol=2e-4 if is_short else 1e-5)
    inside = torch.zeros(tokens, dtype=torch.bool)
    for start, end, _ in segments.bounds:
        inside[start:end] = True
    assert same_bits(actual[~inside], before[~inside])
    return before, hidden, residual, actual


def use(monkeypatch: pytest.MonkeyPatch, *, fused: bool, columns: int = 128, rank_groups: int = 1) -> None:
    """Make launches of this kind, whatever the shapes, with blocks for small ones."""
    choice = Choice(Tuning(16, 64, 2, 1, 1), fused, columns, rank_groups)
    monkeypatch.setattr(gpu, "choose", lambda *args, **kwargs: choice)


@triton.jit
def activate_kernel(x_ptr, y_ptr, kind, size: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, size)
    tl.store(y_ptr + at, gpu_activation.activate(kind, tl.load(x_ptr + at)))


@pytest.mark.parametrize("kind", Activation)
def test_activations(kind: Activation) -> None:
    x = torch.cat([torch.linspace(-12, 12, 255), torch.tensor([0.0]), torch.logspace(-6, 3, 128)])
    x = torch.cat([x, -x[256:]])
    y = torch.empty_like(x)
    activate_kernel[(1,)](x, y, kind.value, size=len(x))
    expected = activate(kind, x.double())
    # the constants of some are given to seven digits
    assert_close(y.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("arena", ARENAS)
def test_every_activation_and_input(arena: torch.dtype) -> None:
    columns, dtype = 33, torch.bfloat16 if arena == torch.int8 else arena
    weights = make_case([((1, 8, 13, 20)[slot % 4], 0) for slot in range(len(Activation))], columns, arena)
    slots = torch.randperm(len(Activation)).tolist()
    starts = [1, *(2 + index for index in range(len(slots)))]
    check(Segments.build(starts, slots), starts[-1] + 1, weights, columns, dtype)


@pytest.mark.parametrize(
    ("start", "slot", "tokens"),
    [
        pytest.param([0], [], 4, id="base only"),
        pytest.param([0, 1], [2], 1, id="one token"),
        pytest.param([2, 6], [1], 9, id="base tokens on both sides"),
        pytest.param([0, 1, 2, 3, 4], [0, 1, 2, 3], 4, id="distinct"),
        pytest.param([0, 3, 5], [0, 0], 5, id="identical"),
        pytest.param([0, 1, 2, 40], [1, 2, 0], 41, id="skewed"),
        pytest.param([0, 0, 7, 7], [0, 1, 2], 7, id="empty segments"),
        pytest.param([0, 5], [3], 5, id="width 0"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_segments(monkeypatch: pytest.MonkeyPatch, start: list[int], slot: list[int], tokens: int, fused: bool) -> None:
    use(monkeypatch, fused=fused)
    weights = make_case([(16, 9), (0, 8), (1, 33), (0, 0)], 20, torch.bfloat16)
    with watching() as launches:
        for site in (0, 1):
            check(Segments.build(start, slot), tokens, weights, 20, torch.bfloat16, site)
    assert len(launches) == (0 if not slot else 2 if fused else 4)


@pytest.mark.slow
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("columns", [8, 33, 64, 320])
def test_sizes(arena: torch.dtype, columns: int) -> None:
    dtype = torch.bfloat16 if arena == torch.int8 else arena
    widths = [((1, 8, 13, 40)[slot % 4], 5) for slot in range(len(Activation) + 1)]
    weights = make_case([*widths, (0, 0)], columns, arena)
    slots = torch.randperm(len(widths) + 1).tolist()
    starts = [1]
    for slot in slots:
        starts.append(starts[-1] + (slot * 7) % 19)
    for site in (0, 1):
        check(Segments.build(starts, slots), starts[-1] + 2, weights, columns, dtype, site)


def test_float32_weights_under_a_bf16_model() -> None:
    weights = make_case([(9, 0), (3, 0), (17, 0)], 40, torch.float32)
    check(Segments.build([0, 2, 4, 6], [0, 1, 2]), 6, weights, 40, torch.bfloat16)


@pytest.mark.parametrize("arena", [torch.bfloat16, torch.int8])
def test_what_is_launched_changes_no_bit(monkeypatch: pytest.MonkeyPatch, arena: torch.dtype) -> None:
    weights = make_case([(9, 0), (33, 0)], 80, arena)
    segments = Segments.build([0, 1, 18], [0, 1])
    use(monkeypatch, fused=True, columns=64)
    before, hidden, residual, whole = check(segments, 18, weights, 80, torch.bfloat16)
    for options in ({"fused": True, "columns": 256}, {"fused": False}, {"fused": False, "rank_groups": 2}):
        use(monkeypatch, **options)
        again = before.clone()
        gpu.bottleneck_add(again, hidden, residual, segments, weights, 1, 0)
        assert same_bits(again, whole), options


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_token_has_the_same_bits_in_every_batch(data: st.DataObject) -> None:
    with rows_alike():
        check_tokens_alone(data)


def check_tokens_alone(data: st.DataObject) -> None:
    torch.manual_seed(0)  # hypothesis repeats examples, and wants the same of each
    columns, dtype = data.draw(st.sampled_from([8, 24, 65])), data.draw(st.sampled_from(DTYPES))
    arena = torch.int8 if dtype == torch.bfloat16 and data.draw(st.booleans()) else dtype
    width = st.sampled_from([0, 1, 8, 13, 33])
    weights = make_case([(data.draw(width), 1) for _ in range(4)], columns, arena)
    starts, slots = [data.draw(st.integers(0, 2))], []
    for length in data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)):
        starts.append(starts[-1] + length)
        slots.append(data.draw(st.integers(0, 3)))
    segments = Segments.build(starts, slots)
    before, hidden, residual, whole = check(segments, starts[-1] + 1, weights, columns, dtype)
    for begin, end, slot in zip(starts, starts[1:], slots, strict=False):
        if begin < end:
            token = data.draw(st.integers(begin, end - 1))
            row = slice(token, token + 1)
            alone = before[row].clone()
            gpu.bottleneck_add(alone, hidden[row], residual[row], Segments.build([0, 1], [slot]), weights, 1, 0)
            assert same_bits(alone, whole[row])


@pytest.mark.parametrize("fused", [True, False])
def test_tiles_that_are_not_in_use(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """As in a captured step: no bounds, and spare tiles whose slot means nothing."""
    use(monkeypatch, fused=fused)
    weights = make_case([(9, 0), (4, 0)], 24, torch.float32)
    built = Segments.build([0, 3, 4], [0, 1])
    before, hidden, residual, expected = check(built, 6, weights, 24, torch.float32)
    spare = torch.tensor([[0, 0, 1 << 30], [4, 4, 77], [0, 0, -1]], dtype=torch.int32)
    segments = Segments(built.start, built.slot, (), torch.cat([spare[:1], built.tiles, spare[1:]]))
    actual = before.clone()
    gpu.bottleneck_add(actual, hidden, residual, segments, weights, 1, 0)
    assert same_bits(actual, expected)


def test_huge_float16_inputs_do_not_overflow() -> None:
    """The stream of a float16 model may be larger than float16's largest number."""
    weights = make_case([(8, 0), (8, 0), (8, 0)], 16, torch.float16)
    weights.input_mode.fill_(op.BottleneckInput.RESIDUAL)
    weights.activation.fill_(Activation.LINEAR)
    segments = Segments.build([0, 1, 2, 3], [0, 1, 2])
    stream, hidden, residual = (x * 1e6 for x in activations(3, 16, torch.float32))
    expected, hidden = stream.clone(), hidden.half() * 0
    op.bottleneck_add_reference(expected, hidden, residual, segments, weights, 0, 0)
    gpu.bottleneck_add(stream, hidden, residual, segments, weights, 0, 0)
    assert_close(stream, expected, rtol=1e-5, atol=10.0)


def test_the_op_finds_it_and_a_stream_that_cannot_be_written() -> None:
    weights, segments = make_case([(9, 0)], 24, torch.float32), Segments.build([0, 3], [0])
    before, hidden, residual, expected = check(segments, 3, weights, 24, torch.float32)
    actual = before.clone()
    op._IMPLEMENTATIONS[Backend.TRITON](actual, hidden, residual, segments, weights, 1, 0)
    assert same_bits(actual, expected)
    with pytest.raises(ValueError, match="stream: columns must be adjacent"):
        gpu.bottleneck_add(before.t().contiguous().t(), hidden, residual, segments, weights, 1, 0)


def launched(target: Target, *, tiles: int, columns: int, pages: int) -> list[tuple[str, int]]:
    """Name and programs of each launch of a call on meta tensors, which have no data to read."""
    weights = BottleneckWeights.empty(elements=8, slots=2, layers=2, pages=pages, dtype=torch.bfloat16, device="meta")
    int32 = {"dtype": torch.int32, "device": "meta"}
    segments = Segments(torch.empty(2, **int32), torch.empty(1, **int32), (), torch.empty(tiles, 3, **int32))
    stream = torch.empty(tiles, columns, device="meta")
    with recording(target) as launches:
        gpu.bottleneck_add(stream, stream.bfloat16(), stream, segments, weights, 1, 1)
    grids = [torch.Size(launch.grid).numel() for launch in launches]
    return [(launch.name, programs) for launch, programs in zip(launches, grids, strict=True)]


@pytest.mark.parametrize("target", CUDA)
def test_launch_choice(target: Target) -> None:
    name, whole, parts = "bottleneck_add_kernel", "bottleneck_shrink_kernel", "bottleneck_expand_kernel"
    assert launched(target, tiles=1, columns=4096, pages=8) == [(name, 16)]
    # columns are cut until the device is full, and never where tiles alone fill it
    assert launched(target, tiles=20, columns=4096, pages=8) == [(name, 160)]
    assert launched(target, tiles=512, columns=4096, pages=32) == [(name, 512)]
    # a wide adapter of few tiles: 16 blocks of rows first
    assert launched(target, tiles=1, columns=4096, pages=32) == [(whole, 16), (parts, 16)]
    assert launched(target, tiles=0, columns=4096, pages=8) == []


def test_rocm_never_reads_what_the_same_launch_wrote() -> None:
    names = [name for name, _ in launched(TARGETS[-1], tiles=4, columns=4096, pages=8)]
    assert names == ["bottleneck_shrink_kernel", "bottleneck_expand_kernel"]
