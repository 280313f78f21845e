import pytest
import torch

from peftserve_kernels import residual_add
from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.gpu import elementwise as gpu
from peftserve_kernels.residual_add import residual_add_reference
from tests.kernels.native import ISAS, isa, same_bits, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (3, 7), (5, 64), (2, 576), (37, 1025)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation(dtype: torch.dtype, shape: tuple[int, int], in_place: bool) -> None:
    residual, hidden = torch.randn(shape), torch.randn(shape).to(dtype)
    expected = residual + hidden.float()
    assert same_bits(residual_add_reference(residual.clone(), hidden, in_place), expected)
    mine = residual.clone()
    y = gpu.residual_add(mine, hidden, in_place)
    assert same_bits(y, expected)
    assert (y.data_ptr() == mine.data_ptr()) == (in_place or not mine.numel())
    assert same_bits(mine, expected if in_place else residual)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native(name: str, dtype: torch.dtype) -> None:
    with isa(name):
        for shape in (*SHAPES, (700, 576)):
            for count in (1, 3):
                residual, hidden = torch.randn(shape), torch.randn(shape).to(dtype)
                with threads(count):
                    assert same_bits(cpu.residual_add(residual.clone(), hidden, True), residual + hidden.float())


def test_faults() -> None:
    with pytest.raises(ValueError, match="hidden's shape"):
        residual_add(torch.zeros(2, 3), torch.zeros(2, 4), in_place=True)
    with pytest.raises(ValueError, match="must be float32"):
        residual_add(torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3), in_place=True)
    for implementation in (cpu.residual_add, gpu.residual_add):
        with pytest.raises(ValueError, match="must be contiguous"):
            implementation(torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3), True)
