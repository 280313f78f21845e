from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peftserve_kernels.cpu.linear import linear_logits
from tests.kernels.native import ISAS, check_rows_alone, isa, same_bits, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
# no output, one, a group, a tile and one more; one column, an odd number, a block, a block and a part
@pytest.mark.parametrize(("outputs", "columns"), [(0, 64), (1, 1), (16, 7), (49, 64), (100, 111), (200, 576)])
def test_against_float64(x_dtype: torch.dtype, weight_dtype: torch.dtype, outputs: int, columns: int) -> None:
    weight = torch.randn(outputs, columns).to(weight_dtype)
    for rows in (0, 1, 2, 7, 8, 9, 131):
        x = torch.randn(rows, columns).to(x_dtype)
        logits = linear_logits(x, weight)
        assert logits.dtype == torch.float32
        assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [75, 320])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, columns: int) -> None:
    weight, x = torch.randn(333, columns).to(dtype), torch.randn(300, columns).to(dtype)
    whole = linear_logits(x, weight)
    cuts = [(i, i + n) for n in (1, 2, 3, 4, 7, 8, 9, 127, 128, 129) for i in (0, 1, 300 - n)]
    check_rows_alone(whole, lambda start, end: linear_logits(x[start:end], weight), cuts)


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 120), columns=st.integers(1, 200), rows=st.integers(1, 140), data=st.data())
def test_any_rows_in_any_order(outputs: int, columns: int, rows: int, data: st.DataObject) -> None:
    weight, x = torch.randn(outputs, columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    picked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=40)))
    whole = linear_logits(x, weight)
    with threads(data.draw(st.integers(1, 3))):
        assert same_bits(linear_logits(x[picked], weight), whole[picked])
