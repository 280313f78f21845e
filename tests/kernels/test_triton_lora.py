"""lora_add in Triton, under its interpreter, and how it is launched."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftserve_kernels import Backend, LoraSlice, LoraWeights, Segments
from peftserve_kernels import lora as op
from peftserve_kernels.gpu import lora as gpu
from peftserve_kernels.gpu.launch import TARGETS, Target, recording, watching
from peftserve_kernels.gpu.low_rank import Choice, Tuning
from tests.kernels.interpreter import rows_alike
from tests.kernels.native import same_bits
from tests.kernels.test_native_lora import assert_near, make_slices, make_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = [target for target in TARGETS if target.backend == "cuda"]
FAR = 1 << 50  # an offset that nobody may follow


def make_case(
    columns: int, outs: Sequence[int], ranks: Sequence[Sequence[int]], dtype: torch.dtype, arena: torch.dtype
) -> tuple[LoraWeights, tuple[LoraSlice, ...]]:
    """Odd slots have row scales. Pages that are not in use lie nowhere."""
    slices = make_slices(columns, outs)
    weights = make_weights(ranks, slices, arena, row_scaled=range(1, len(ranks), 2))
    for table in (weights.a_page, weights.b_page):
        used = -(-weights.rank.long() // 8)
        table[torch.arange(table.shape[-1]) >= used[..., None]] = FAR
    return weights, slices


def check(
    segments: Segments, tokens: int, weights: LoraWeights, slices: Sequence[LoraSlice], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Against the reference; x, y before and y after."""
    x = torch.randn(tokens, slices[0].in_features).to(dtype)
    before = torch.randn(tokens, sum(piece.out_features for piece in slices)).to(dtype)
    actual, expected = before.clone(), before.clone()
    op.lora_add_reference(expected, x, segments, weights, 1, slices)
    gpu.lora_add(actual, x, segments, weights, 1, slices)
    # of a few outputs that nearly cancel, float32 sums in another order are off by a little more
    assert_near(actual, expected, float32_place=2e-6)
    inside = torch.zeros(tokens, dtype=torch.bool)
    for start, end, _ in segments.bounds:
        inside[start:end] = True
    assert same_bits(actual[~inside], before[~inside])
    return x, before, actual


def use(monkeypatch: pytest.MonkeyPatch, *, fused: bool, columns: int = 128, rank_groups: int = 1) -> None:
    """Make launches of this kind, whatever the shapes, with blocks for small ones."""
    choice = Choice(Tuning(16, 64, 2, 1, 1), fused, columns, rank_groups)
    monkeypatch.setattr(gpu, "choose", lambda *args, **kwargs: choice)


@pytest.mark.parametrize(
    ("start", "slot", "tokens"),
    [
        pytest.param([0], [], 5, id="base only"),
        pytest.param([0, 1], [3], 1, id="one token"),
        pytest.param([2, 6], [1], 9, id="base tokens on both sides"),
        pytest.param([0, 1, 2, 3, 4], [0, 1, 2, 3], 4, id="distinct, one token each"),
        pytest.param([0, 3, 5, 12], [3, 3, 3], 12, id="identical"),
        pytest.param([0, 1, 2, 40], [1, 0, 3], 41, id="skewed"),
        pytest.param([0, 0, 7, 7, 7], [0, 1, 3, 2], 7, id="empty segments"),
        pytest.param([0, 5], [2], 5, id="rank 0 everywhere"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_segments(monkeypatch: pytest.MonkeyPatch, start: list[int], slot: list[int], tokens: int, fused: bool) -> None:
    use(monkeypatch, fused=fused)
    ranks = [[1, 4, 8], [16, 0, 33], [0, 0, 0], [9, 7, 17]]
    weights, slices = make_case(24, (40, 8, 16), ranks, torch.bfloat16, torch.bfloat16)
    segments = Segments.build(start, slot)
    with watching() as launches:
        check(segments, tokens, weights, slices, torch.bfloat16)
    assert len(launches) == (0 if not slot else 1 if fused else 2)


@pytest.mark.parametrize(
    ("dtype", "arena"),
    [
        *zip(DTYPES, DTYPES, strict=True),
        *((dtype, arena) for dtype in DTYPES[1:] for arena in (torch.float32, torch.int8)),
    ],
)
def test_dtypes(dtype: torch.dtype, arena: torch.dtype) -> None:
    weights, slices = make_case(33, (65, 1, 16), [[9, 1, 8], [3, 16, 17]], dtype, arena)
    check(Segments.build([1, 3, 20], [0, 1]), 21, weights, slices, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arena"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.int8)])
@pytest.mark.parametrize(
    ("columns", "outs"), [(1, (1,)), (7, (5, 3)), (97, (130, 31)), (576, (576, 192, 192)), (4100, (64,))]
)
def test_sizes(dtype: torch.dtype, arena: torch.dtype, columns: int, outs: tuple[int, ...]) -> None:
    ranks = [[(1, 8, 9)[(slot + target) % 3] for target in range(len(outs))] for slot in range(3)]
    weights, slices = make_case(columns, outs, [*ranks, [64] * len(outs), [0] * len(outs)], dtype, arena)
    check(Segments.build([1, 2, 4, 4, 21, 24, 61], [0, 3, 1, 1, 4, 2]), 63, weights, slices, dtype)


@pytest.mark.parametrize("arena", [torch.bfloat16, torch.int8])
def test_what_is_launched_changes_no_bit(monkeypatch: pytest.MonkeyPatch, arena: torch.dtype) -> None:
    """One launch or two, over any number of columns and rank groups, with several column splits."""
    monkeypatch.setattr(gpu, "SPLIT_COLUMNS", 32)
    weights, slices = make_case(75, (140, 30), [[33, 9], [16, 4]], torch.bfloat16, arena)
    segments = Segments.build([0, 1, 6], [1, 0])
    use(monkeypatch, fused=True, columns=64)
    x, before, whole = check(segments, 6, weights, slices, torch.bfloat16)
    for options in ({"fused": True, "columns": 256}, {"fused": False}, {"fused": False, "rank_groups": 3}):
        use(monkeypatch, **options)
        again = before.clone()
        gpu.lora_add(again, x, segments, weights, 1, slices)
        assert same_bits(again, whole), options


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_token_has_the_same_bits_in_every_batch(data: st.DataObject) -> None:
    with rows_alike():
        check_tokens_alone(data)


def check_tokens_alone(data: st.DataObject) -> None:
    torch.manual_seed(0)  # hypothesis repeats examples, and wants the same of each
    dtype, is_int8 = data.draw(st.sampled_from([*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)]))
    outs = data.draw(st.lists(st.sampled_from([1, 16, 40]), min_size=1, max_size=2))
    rank = st.sampled_from([0, 1, 3, 8, 13, 33])
    ranks = [[data.draw(rank) for _ in outs] for _ in range(3)]
    arena = torch.int8 if is_int8 else dtype
    weights, slices = make_case(data.draw(st.sampled_from([1, 24, 65])), outs, ranks, dtype, arena)
    starts, slots = [data.draw(st.integers(0, 2))], []
    for length in data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)):
        starts.append(starts[-1] + length)
        slots.append(data.draw(st.integers(0, 2)))
    x, before, whole = check(Segments.build(starts, slots), starts[-1] + 1, weights, slices, dtype)
    for begin, end, slot in zip(starts, starts[1:], slots, strict=False):
        if begin < end:
            token = data.draw(st.integers(begin, end - 1))
            row = slice(token, token + 1)
            alone = before[row].clone()
            gpu.lora_add(alone, x[row], Segments.build([0, 1], [slot]), weights, 1, slices)
            assert same_bits(alone, whole[row])


def test_a_broken_token_disturbs_no_other() -> None:
    weights, slices = make_case(24, (24, 8), [[8, 16], [4, 1]], torch.bfloat16, torch.bfloat16)
    segments = Segments.build([0, 5, 12], [0, 1])
    x, before, clean = check(segments, 12, weights, slices, torch.bfloat16)
    x[4] = torch.nan
    broken = before.clone()
    gpu.lora_add(broken, x, segments, weights, 1, slices)
    assert broken[4].isnan().all()
    rest = [token for token in range(12) if token != 4]
    assert same_bits(broken[rest], clean[rest])


@pytest.mark.parametrize("fused", [True, False])
def test_tiles_that_are_not_in_use(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """As in a captured step: no bounds, and spare tiles whose slot means nothing."""
    use(monkeypatch, fused=fused)
    weights, slices = make_case(24, (40,), [[9], [4]], torch.float32, torch.float32)
    built = Segments.build([0, 3, 4], [0, 1])
    x, before, expected = check(built, 6, weights, slices, torch.float32)
    spare = torch.tensor([[0, 0, FAR >> 20], [4, 4, 77], [0, 0, -1]], dtype=torch.int32)
    segments = Segments(built.start, built.slot, (), torch.cat([spare[:1], built.tiles, spare[1:]]))
    actual = before.clone()
    gpu.lora_add(actual, x, segments, weights, 1, slices)
    assert same_bits(actual, expected)


def test_rows_that_are_not_adjacent() -> None:
    weights, slices = make_case(24, (40,), [[9]], torch.float32, torch.float32)
    segments = Segments.build([0, 3], [0])
    x, before, expected = check(segments, 3, weights, slices, torch.float32)
    wide, wide_x = torch.zeros(3, 50), torch.zeros(3, 30)
    wide[:, 5:45], wide_x[:, 2:26] = before, x
    gpu.lora_add(wide[:, 5:45], wide_x[:, 2:26], segments, weights, 1, slices)
    assert same_bits(wide[:, 5:45], expected)
    assert not wide[:, :5].any()
    assert not wide[:, 45:].any()
    with pytest.raises(ValueError, match="y: columns must be adjacent"):
        gpu.lora_add(before.t().contiguous().t(), x, segments, weights, 1, slices)


def test_the_op_finds_it() -> None:
    weights, slices = make_case(24, (40,), [[9]], torch.float32, torch.float32)
    segments = Segments.build([0, 3], [0])
    x, before, expected = check(segments, 3, weights, slices, torch.float32)
    op._IMPLEMENTATIONS[Backend.TRITON](before, x, segments, weights, 1, slices)
    assert same_bits(before, expected)


def launched(target: Target, *, tiles: int, columns: int, outs: Sequence[int], pages: int) -> list[tuple[str, int]]:
    """Name and programs of each launch of a call on meta tensors, which have no data to read."""
    slices = make_slices(columns, outs)
    weights = LoraWeights.empty(
        elements=8, slots=2, layers=2, targets=3, pages=pages, dtype=torch.bfloat16, device="meta"
    )
    int32 = {"dtype": torch.int32, "device": "meta"}
    segments = Segments(torch.empty(2, **int32), torch.empty(1, **int32), (), torch.empty(tiles, 3, **int32))
    x = torch.empty(tiles, columns, dtype=torch.bfloat16, device="meta")
    y = torch.empty(tiles, sum(outs), dtype=torch.bfloat16, device="meta")
    with recording(target) as launches:
        gpu.lora_add(y, x, segments, weights, 1, slices)
    grids = [torch.Size(launch.grid).numel() for launch in launches]
    return [(launch.name, programs) for launch, programs in zip(launches, grids, strict=True)]


QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("outs", [QKV, GATE_UP, (4096,)])
@pytest.mark.parametrize("tiles", [1, 2, 8, 64, 256])
def test_decode_is_one_launch_that_fills_the_device_once(target: Target, outs: tuple[int, ...], tiles: int) -> None:
    ((name, programs),) = launched(target, tiles=tiles, columns=4096, outs=outs, pages=8)
    assert name == "lora_add_kernel"
    # programs repeat the shrink of their tile: no more of them than the device takes, beyond one a slice
    assert programs <= max(300, tiles * len(outs))
    assert programs >= min(74, sum(outs) // 256 * tiles)


@pytest.mark.parametrize("target", CUDA)
def test_a_long_row_of_few_tiles_is_spread_first(target: Target) -> None:
    shrink, expand = launched(target, tiles=2, columns=14336, outs=(4096,), pages=8)
    # 2 tiles, 4 column splits, 4 blocks of rank rows; 2 tiles, 16 pieces of 256 columns
    assert shrink == ("lora_shrink_kernel", 32)
    assert expand == ("lora_expand_kernel", 32)
    assert launched(target, tiles=256, columns=14336, outs=(4096,), pages=8) == [("lora_add_kernel", 256)]


def test_rocm_never_reads_what_the_same_launch_wrote() -> None:
    names = [name for name, _ in launched(TARGETS[-1], tiles=4, columns=4096, outs=QKV, pages=8)]
    assert names == ["lora_shrink_kernel", "lora_expand_kernel"]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_do_is_no_launch(target: Target) -> None:
    assert launched(target, tiles=0, columns=64, outs=(64,), pages=8) == []
    assert launched(target, tiles=4, columns=64, outs=(64,), pages=0) == []
