from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

import peftserve_kernels
from peftserve_kernels import Nf4Weight
from peftserve_kernels.cpu.nf4_linear import has_int8_inputs, nf4_linear
from peftserve_kernels.nf4_linear import nf4_linear_reference
from tests.kernels.native import ISAS, check_rows_alone, isa, same_bits, threads
from tests.kernels.nf4_oracle import quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


def close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Against float64; bf16 and fp16 round the result, and bf16 may round the sixteen levels."""
    wanted = functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    size = wanted.abs().max() if wanted.numel() else 1.0
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
    assert y.dtype == x.dtype
    assert_close(y.double() / size, wanted / size, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
# one row of output, fewer than a group, a group, one more, several tiles with a short last one
@pytest.mark.parametrize("shape", [(1, 64), (15, 64), (16, 128), (17, 192), (96, 576), (601, 320)])
@pytest.mark.parametrize("tiled", [False, True])
def test_against_the_dense_layer(dtype: torch.dtype, shape: tuple[int, int], tiled: bool) -> None:
    weight, dense = quantize(torch.randn(shape))
    if tiled:
        if shape[0] % 16:
            return
        weight = weight.tiled()
    for rows in (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 129):
        x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]) if rows % 2 else None
        close(nf4_linear(x, weight, bias), x, dense, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    weight, _ = quantize(torch.randn(224, 320))
    weight, x, bias = weight.tiled(), torch.randn(300, 320).to(dtype), torch.randn(224)
    whole = nf4_linear(x, weight, bias)
    cuts = [(i, i + n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 64, 127, 128, 129, 200) for i in (0, 1, 300 - n)]
    check_rows_alone(whole, lambda start, end: nf4_linear(x[start:end], weight, bias), cuts)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 14),
    blocks=st.integers(1, 6),
    rows=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_rows_in_any_order(groups: int, blocks: int, rows: int, dtype: torch.dtype, data: st.DataObject) -> None:
    codes = torch.randint(0, 256, (groups * 16, blocks * 32), dtype=torch.uint8)
    weight = Nf4Weight(codes, torch.rand(groups * 16, blocks)).tiled()
    x = torch.randn(rows, blocks * 64).to(dtype)
    picked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=40)))
    whole = nf4_linear(x, weight)
    with threads(data.draw(st.integers(1, 3))):
        assert same_bits(nf4_linear(x[picked], weight), whole[picked])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_row_disturbs_no_other(dtype: torch.dtype) -> None:
    weight, _ = quantize(torch.randn(48, 128))
    x = torch.randn(12, 128).to(dtype)
    clean = nf4_linear(x, weight)
    x[5] = torch.nan
    y = nf4_linear(x, weight)
    assert y[5].isnan().all()
    rest = [i for i in range(12) if i != 5]
    assert same_bits(y[rest], clean[rest])


@pytest.fixture
def _int8_inputs() -> None:
    if not has_int8_inputs():
        pytest.skip("this instruction set has no int8 inputs")


@pytest.mark.usefixtures("_int8_inputs")
@pytest.mark.parametrize("shape", [(1, 64), (17, 192), (96, 576), (601, 320)])
def test_int8_inputs(shape: tuple[int, int]) -> None:
    """Integers are exact: the reference's result but for float32 sums and one rounding, and near the dense layer's."""
    weight, dense = quantize(torch.randn(shape))
    for rows in (0, 1, 2, 3, 5, 8, 9, 31, 129, 300):
        x, bias = torch.randn(rows, shape[1]).bfloat16(), torch.randn(shape[0]) if rows % 2 else None
        x[:: 2 + rows] *= 100.0
        y = nf4_linear(x, weight, bias, int8_inputs=True)
        wanted = nf4_linear_reference(x, weight, bias, int8_inputs=True)
        assert_close(y, wanted, rtol=2**-7, atol=1e-4)
        if rows > 100 and shape[1] > 64:
            exact = functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
            assert (y - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


@pytest.mark.usefixtures("_int8_inputs")
def test_a_row_of_int8_inputs_has_the_same_bits_in_every_batch() -> None:
    weight, x = quantize(torch.randn(224, 320))[0].tiled(), torch.randn(300, 320).bfloat16()
    whole = nf4_linear(x, weight, int8_inputs=True)
    cuts = [(i, i + n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 64, 127, 128, 129, 200) for i in (0, 1, 300 - n)]
    check_rows_alone(whole, lambda start, end: nf4_linear(x[start:end], weight, int8_inputs=True), cuts)


@pytest.mark.usefixtures("_int8_inputs")
def test_int8_inputs_that_are_zero_infinite_or_extreme() -> None:
    weight, _ = quantize(torch.randn(48, 128))
    x = torch.randn(12, 128).bfloat16()
    x[2], x[3], x[4, 70], x[5, 1], x[6], x[7] = 0.0, -x[1], torch.inf, torch.nan, x[1] * 2.0**100, x[1] * 2.0**-100
    y = nf4_linear(x, weight, int8_inputs=True)
    assert not y[2].any()
    assert same_bits(y[3], -y[1])
    assert y[4:6].isnan().all()
    assert same_bits(y[6], y[1] * 2.0**100)
    assert same_bits(y[7], y[1] * 2.0**-100)
    assert y[[0, 1, *range(8, 12)]].isfinite().all()


def test_int8_inputs_are_refused_where_there_are_none() -> None:
    weight, _ = quantize(torch.randn(16, 64))
    with pytest.raises(ValueError, match="int8_inputs: they take bfloat16 activations, not float32"):
        peftserve_kernels.nf4_linear(torch.randn(1, 64), weight, int8_inputs=True)
    if not has_int8_inputs():
        with pytest.raises(ValueError, match="int8_inputs: they need a processor with AVX-512 and VNNI"):
            peftserve_kernels.nf4_linear(torch.randn(1, 64).bfloat16(), weight, int8_inputs=True)


def test_inputs_that_are_views() -> None:
    weight, dense = quantize(torch.randn(32, 128))
    x = torch.randn(5, 256)[:, ::2]
    close(nf4_linear(x, weight), x, dense, None)
    rows = quantize(torch.randn(64, 128))[0].tiled().rows(16, 48)
    assert same_bits(nf4_linear(x, rows), nf4_linear(x, rows.row_major()))
