from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peftserve_kernels.cpu.elementwise import embedding, rms_norm, silu_mul
from tests.kernels.native import ISAS, check_rows_alone, isa
from tests.kernels.rounding import assert_rounded_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 4, 15, 16, 17, 63, 64, 65, 577]


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(dtype: torch.dtype, out_dtype: torch.dtype, size: int) -> None:
    for rows in (0, 1, 5):
        x, weight = (torch.randn(rows, size) * 3).to(dtype), torch.randn(size).to(dtype)
        y = rms_norm(x, weight, 1e-5, out_dtype)
        assert y.dtype == out_dtype
        assert_rounded_once(y, normalized(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    for rows in (0, 1, 5):
        gate_up = (torch.randn(rows, 2 * size) * 4).to(dtype)
        gate, up = gate_up.double().chunk(2, dim=1)
        assert_rounded_once(silu_mul(gate_up), gate * torch.sigmoid(gate) * up)


def test_silu_over_the_whole_range() -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    y = silu_mul(torch.stack((gate, torch.ones_like(gate)), dim=1).flatten().view(-1, 2))
    assert_rounded_once(y[:, 0], gate.double() * torch.sigmoid(gate.double()), rtol=1e-6, atol=1e-35)
    assert silu_mul(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", SIZES)
def test_embedding(dtype: torch.dtype, id_dtype: torch.dtype, size: int) -> None:
    table = torch.randn(11, size).to(dtype)
    for rows in (0, 1, 5):
        ids = torch.randint(0, 11, (rows,), dtype=id_dtype)
        assert torch.equal(embedding(ids, table), table[ids.long()].float())


@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_outside_the_table(bad: int) -> None:
    with pytest.raises(IndexError, match=r"0 \.\. 10, got"):
        embedding(torch.tensor([3, bad]), torch.randn(11, 4))


def test_rows_have_the_same_bits_in_every_batch() -> None:
    x, weight = torch.randn(600, 1154).bfloat16(), torch.randn(1154)
    cuts = [(0, 1), (599, 600), (17, 40), (0, 600)]
    check_rows_alone(
        rms_norm(x, weight, 1e-5, torch.bfloat16),
        lambda start, end: rms_norm(x[start:end], weight, 1e-5, torch.bfloat16),
        cuts,
    )
    check_rows_alone(silu_mul(x), lambda start, end: silu_mul(x[start:end]), cuts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_widened_exactly(dtype: torch.dtype) -> None:
    table = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    wide = embedding(torch.arange(256), table)
    assert torch.equal(wide.nan_to_num(1.5), table.float().nan_to_num(1.5))
    assert torch.equal(wide.isnan(), table.isnan())
