import pytest
import torch

from peftserve_kernels import silu_mul
from tests.kernels.rounding import assert_rounded_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 1537), (64, 96)])
def test_formula_in_float64(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = (torch.randn(rows, 2 * width) * 3).to(dtype)
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    y = silu_mul(gate_up)
    assert y.dtype == dtype
    assert_rounded_once(y, gate / (1 + torch.exp(-gate)) * up, atol=1e-6)


def test_extremes_stay_finite() -> None:
    y = silu_mul(torch.tensor([[-1e4, 1e4, 2.0, 2.0]]))
    assert y.tolist() == [[0.0, 2e4]]


def test_faults() -> None:
    with pytest.raises(ValueError, match=r"gate_up: must be \[M, 2 I\], got \[2, 5\]"):
        silu_mul(torch.zeros(2, 5))
