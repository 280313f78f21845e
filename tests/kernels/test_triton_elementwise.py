import pytest
import torch
from torch import Tensor

from peftserve_kernels.gpu.elementwise import embedding, piece_choice, rms_norm, row_choice, silu_mul
from peftserve_kernels.gpu.launch import Target, recording
from tests.kernels.rounding import assert_rounded_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 65, 577]


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(dtype: torch.dtype, out_dtype: torch.dtype, size: int) -> None:
    for rows in (0, 3):
        x, weight = (torch.randn(rows, size) * 3).to(dtype), torch.randn(size).to(dtype)
        y = rms_norm(x, weight, 1e-5, out_dtype)
        assert y.dtype == out_dtype
        wide = x.double()
        assert_rounded_once(y, wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double())


@pytest.mark.parametrize("size", [16384, 16385, 40000])
def test_rms_norm_of_wide_rows(size: int) -> None:
    x, weight = torch.randn(2, size), torch.randn(size)
    wide = x.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert_rounded_once(rms_norm(x, weight, 1e-6, torch.bfloat16), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, 2000])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    for rows in (0, 3):
        gate_up = (torch.randn(rows, 2 * size) * 4).to(dtype)
        gate, up = gate_up.double().chunk(2, dim=1)
        y = silu_mul(gate_up)
        assert y.dtype == dtype
        assert_rounded_once(y, gate * torch.sigmoid(gate) * up)


def test_silu_over_the_whole_range() -> None:
    gate = torch.cat([torch.linspace(-80, 120, 401), torch.tensor([0.0, -0.0, 1e-30, 3e38])])
    y = silu_mul(torch.stack((gate, torch.ones_like(gate)), dim=1))
    assert_rounded_once(y[:, 0], gate.double() * torch.sigmoid(gate.double()), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [*SIZES, 2000])
def test_embedding(dtype: torch.dtype, id_dtype: torch.dtype, size: int) -> None:
    table = torch.randn(11, size).to(dtype)
    for rows in (0, 3):
        ids = torch.randint(0, 11, (rows,), dtype=id_dtype)
        assert torch.equal(embedding(ids, table), table[ids.long()].float())


def test_tensors_that_are_not_contiguous() -> None:
    x, weight = torch.randn(40, 6).T, torch.randn(80)[::2]
    assert torch.equal(rms_norm(x, weight, 1e-5, x.dtype), rms_norm(x.contiguous(), weight.contiguous(), 1e-5, x.dtype))
    assert torch.equal(silu_mul(x), silu_mul(x.contiguous()))
    ids = torch.arange(6)[::2]
    assert torch.equal(embedding(ids, x), x[ids])


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    x, weight = torch.randn(6, 130), torch.randn(130)
    assert torch.equal(rms_norm(x, weight, 1e-5, x.dtype)[2:4], rms_norm(x[2:4], weight, 1e-5, x.dtype))
    assert torch.equal(silu_mul(x)[5:], silu_mul(x[5:]))


@pytest.mark.parametrize(
    ("columns", "block", "warps"), [(1, 1, 1), (576, 1024, 2), (4096, 4096, 8), (20000, 16384, 16)]
)
def test_row_choice(columns: int, block: int, warps: int) -> None:
    assert row_choice(columns) == (block, warps)


@pytest.mark.parametrize(("columns", "block", "warps"), [(1, 1, 1), (576, 1024, 4), (14336, 1024, 4), (200, 256, 1)])
def test_piece_choice(columns: int, block: int, warps: int) -> None:
    assert piece_choice(columns) == (block, warps)


def test_one_launch_each() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recording(Target("cuda", 90)) as launches:
        assert rms_norm(meta(7, 4096), meta(4096), 1e-5, torch.float16).dtype == torch.float16
        assert silu_mul(meta(7, 2 * 14336)).shape == (7, 14336)
        assert embedding(meta(7, dtype=torch.int64), meta(100, 4096)).shape == (7, 4096)
        silu_mul(meta(0, 8))
    assert [launch.grid for launch in launches] == [(7,), (7, 14), (7, 4)]
