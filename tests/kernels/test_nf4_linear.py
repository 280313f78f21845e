import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from peftserve_kernels import nf4_linear
from peftserve_kernels.nf4_linear import nf4_linear_reference
from tests.kernels.nf4_oracle import quantize
from tests.kernels.rounding import assert_rounded_once

# (N, K): one row, fewer rows than a tile, several tiles with a short last one
SHAPES = [(1, 64), (37, 192), (576, 576), (1000, 576), (601, 1536)]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_equals_the_dense_layer(rows: int, shape: tuple[int, int], bias: bool) -> None:
    weight, dense = quantize(torch.randn(shape))
    x, b = torch.randn(rows, shape[1]), torch.randn(shape[0]) if bias else None
    y = nf4_linear(x, weight, b)
    assert y.dtype == torch.float32
    oracle = functional.linear(x.double(), dense.double(), None if b is None else b.double())
    assert_close(y.double(), oracle, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 64])
def test_narrow_inputs_accumulate_in_float32(dtype: torch.dtype, rows: int) -> None:
    weight, dense = quantize(torch.randn(301, 1536) / 1536**0.5)
    x, bias = torch.randn(rows, 1536).to(dtype), torch.randn(301).to(dtype)
    y = nf4_linear(x, weight, bias)
    assert y.dtype == dtype
    oracle = functional.linear(x.double(), dense.double(), bias.double())
    # half a unit in the last place of the result, and of each weight where they are rounded (random: sqrt(K) averaging)
    half_ulp = torch.finfo(dtype).eps / 2
    assert_close(y.double(), oracle, rtol=2 * half_ulp, atol=2 * half_ulp)


def test_few_bf16_rows_round_once_in_the_reference() -> None:
    weight, dense = quantize(torch.randn(64, 576))
    x = torch.randn(8, 576).bfloat16()
    exact = functional.linear(x.double(), dense.double())
    assert_rounded_once(nf4_linear_reference(x, weight), exact, atol=1e-4)


def test_faults() -> None:
    weight, _ = quantize(torch.randn(4, 128))
    with pytest.raises(ValueError, match=r"x: must be \[M, 128\], got \[2, 64\]"):
        nf4_linear(torch.zeros(2, 64), weight)
    with pytest.raises(ValueError, match=r"bias: must be \[4\], got \[5\]"):
        nf4_linear(torch.zeros(2, 128), weight, torch.zeros(5))
