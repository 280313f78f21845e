import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from peftserve_kernels import Nf4Layout, Nf4Weight, prepare_nf4
from peftserve_kernels import nf4_linear as public_op
from peftserve_kernels.capture import CaptureGuard
from peftserve_kernels.dispatch import Backend, forced_backend
from peftserve_kernels.gpu.launch import TARGETS, Launch, Target, recording
from peftserve_kernels.gpu.nf4_linear import launch_config, nf4_linear, splits_of
from peftserve_kernels.nf4_linear import nf4_linear_reference
from tests.kernels.native import same_bits
from tests.kernels.nf4_oracle import quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = [target for target in TARGETS if target.backend == "cuda"]


def close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Against float64; bf16 and fp16 round the result once and the sixteen levels."""
    wanted = functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    size = wanted.abs().max() if wanted.numel() else 1.0
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
    assert y.dtype == x.dtype
    assert_close(y.double() / size, wanted / size, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
# one row, fewer than a tile, a tile, several programs with a short last one; one block, unrolls of 3, 2 and 4, splits
@pytest.mark.parametrize("shape", [(1, 64), (16, 192), (80, 128), (33, 576), (32, 768)])
def test_against_the_dense_layer(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, dense = quantize(torch.randn(shape))
    if shape[0] % 16 == 0:
        weight = weight.blocked()
    for rows in (0, 1, 9, 70):
        x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if rows % 2 else None
        close(nf4_linear(x, weight, bias), x, dense, bias)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (48, 64), (130, 576), (192, 1536), (32, 4096)])
def test_against_the_reference_in_all_tiles(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, dense = quantize(torch.randn(shape) / shape[1] ** 0.5)
    for rows in (1, 9, 17, 33, 65, 129):
        x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if rows % 2 else None
        y = nf4_linear(x, weight, bias)
        close(y, x, dense, bias)
        close(nf4_linear_reference(x, weight, bias), x, dense, bias)


@settings(max_examples=8, deadline=None)
@given(
    tiles=st.integers(1, 6),
    blocks=st.integers(1, 9),
    rows=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_any_shape(tiles: int, blocks: int, rows: int, dtype: torch.dtype, bias: bool) -> None:
    codes = torch.randint(0, 256, (tiles * 16, blocks * 32), dtype=torch.uint8)
    weight = Nf4Weight(codes, torch.rand(tiles * 16, blocks))
    x, b = torch.randn(rows, blocks * 64).to(dtype), torch.randn(tiles * 16).to(dtype) if bias else None
    close(nf4_linear(x, weight.blocked(), b), x, _dense(weight), b)


def _dense(weight: Nf4Weight) -> Tensor:
    return nf4_linear_reference(torch.eye(weight.shape[1]), weight).t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_split_sums_in_the_same_order_as_one_program(dtype: torch.dtype) -> None:
    """Few tokens add splits by the second kernel, many in turn: the same bits, where products are the same."""
    weight = quantize(torch.randn(32, 512))[0].blocked()
    target = TARGETS[0]
    assert splits_of(target, 32, 512).number > 1
    assert launch_config(target, dtype, 65).splits_in_turn
    # products exact in float32, so that no order within a block shows
    x = torch.randint(-8, 9, (65, 512)).to(dtype)
    many = nf4_linear(x, weight)
    for start, end in ((0, 1), (10, 26), (0, 64)):
        assert_close(nf4_linear(x[start:end], weight), many[start:end], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_row_disturbs_no_other(dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(48, 256))[0].blocked()
    x = torch.randn(12, 256).to(dtype)
    clean = nf4_linear(x, weight)
    x[5] = torch.nan
    y = nf4_linear(x, weight)
    assert y[5].isnan().all()
    rest = [i for i in range(12) if i != 5]
    assert same_bits(y[rest], clean[rest])


def test_inputs_and_weights_that_are_views() -> None:
    weight, dense = quantize(torch.randn(64, 128))
    strided = torch.randn(5, 256)[:, ::2]
    close(nf4_linear(strided, weight.blocked()), strided, dense, None)
    part = torch.randn(5, 256)[:, 64:192]
    close(nf4_linear(part, weight.blocked().rows(16, 48)), part, dense[16:48], None)


@pytest.mark.parametrize("layout", list(Nf4Layout))
def test_every_layout_is_read(layout: Nf4Layout) -> None:
    weight, dense = quantize(torch.randn(32, 128))
    stored = {Nf4Layout.ROWS: weight, Nf4Layout.TILES: weight.tiled(), Nf4Layout.BLOCKS: weight.blocked()}[layout]
    x = torch.randn(3, 128)
    close(nf4_linear(x, stored), x, dense, None)


def test_dispatch_and_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSERVE_KERNELS", "triton")
    forced_backend.cache_clear()
    try:
        assert forced_backend() is Backend.TRITON
        weight, dense = quantize(torch.randn(48, 128))
        prepared = prepare_nf4(weight)
        assert prepared.layout is Nf4Layout.BLOCKS
        x = torch.randn(4, 128)
        close(public_op(x, prepared), x, dense, None)
        odd, dense = quantize(torch.randn(20, 64))
        prepared = prepare_nf4(odd)
        assert (prepared.layout, prepared.shape, prepared.padding) == (Nf4Layout.BLOCKS, (20, 64), 12)
        x, bias = torch.randn(3, 64), torch.randn(20)
        close(public_op(x, prepared, bias), x, dense, bias)
        with recording(TARGETS[0]), CaptureGuard(computes=False):
            assert public_op(x, prepared, bias).shape == (3, 20)
    finally:
        monkeypatch.undo()
        forced_backend.cache_clear()


def launches(target: Target, tokens: int, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta")
    weight = Nf4Weight(packed, torch.empty(rows, columns // 64, device="meta"), Nf4Layout.BLOCKS)
    with recording(target) as recorded:
        y = nf4_linear(torch.empty(tokens, columns, dtype=dtype, device="meta"), weight)
    assert y.shape == (tokens, rows)
    return recorded


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(576, 576), (576, 1536), (3072, 576), (4096, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_cover_the_output(target: Target, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    for tokens in (1, 8, 9, 16, 17, 33, 64, 65, 8192):
        recorded = launches(target, tokens, rows, columns, dtype)
        config, splits = launch_config(target, dtype, tokens), splits_of(target, rows, columns)
        assert splits.blocks * splits.number >= columns // 64 > splits.blocks * (splits.number - 1)
        assert splits.blocks % splits.unroll == 0
        assert (columns // 64) % splits.unroll == 0
        product = recorded[0]
        assert product.grid[0] * config.block_m >= tokens > (product.grid[0] - 1) * config.block_m
        assert product.grid[1] * config.block_n >= rows > (product.grid[1] - 1) * config.block_n
        is_split = splits.number > 1 and not config.splits_in_turn
        assert product.grid[2] == (splits.number if is_split else 1)
        assert product.grid[2] * product.constants["TURNS"] == splits.number
        assert len(recorded) == 1 + is_split


@pytest.mark.parametrize("target", CUDA)
def test_decode_fills_the_chip(target: Target) -> None:
    """At N = K = 4096 a launch for few tokens has at least a program for each of 108 to 148 multiprocessors."""
    for tokens in (1, 8, 16, 32):
        x, y, z = launches(target, tokens, 4096, 4096)[0].grid
        assert x * y * z >= 148


def test_the_memory_of_splits_is_bounded() -> None:
    """Only few tokens have sums in memory: at most 8 times 64 tokens."""
    for target in TARGETS:
        for tokens in (64, 65, 8192):
            config = launch_config(target, torch.bfloat16, tokens)
            assert config.splits_in_turn == (tokens > 64)


def test_the_choice_of_tiles() -> None:
    for target in CUDA:
        for tokens in (1, 5, 8, 12, 16, 20, 32, 40, 64):
            config = launch_config(target, torch.bfloat16, tokens)
            # one tile of tokens: each weight is decoded once, and no more than twice the tokens are multiplied
            assert tokens <= config.block_m <= max(8, 2 * tokens)
    hopper = TARGETS[1]
    assert launch_config(hopper, torch.bfloat16, 8).num_warps == 2
    assert not launch_config(hopper, torch.float16, 16).weight_first
    assert launch_config(Target("cuda", 120), torch.bfloat16, 8) == launch_config(TARGETS[0], torch.bfloat16, 8)
