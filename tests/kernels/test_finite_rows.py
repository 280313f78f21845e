import math

import pytest
import torch

from peftserve_kernels import finite_rows
from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.finite_rows import finite_rows_reference
from tests.kernels.native import ISAS, isa, threads


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("columns", [0, 1, 15, 16, 64, 65, 1000])
def test_native(name: str, columns: int) -> None:
    for rows in (0, 1, 5, 700):
        x = torch.randn(rows, columns) * 3e38  # with infinities
        x[: rows // 2].clamp_(-3e38, 3e38)
        for row in range(0, rows, 3):
            if columns:
                x[row, row % columns] = (math.nan, math.inf, -math.inf)[row % 3]
        for count in (1, 3):
            with isa(name), threads(count):
                assert torch.equal(cpu.finite_rows(x), finite_rows_reference(x))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_place_counts(name: str, value: float) -> None:
    x = torch.zeros(85, 85)
    x.fill_diagonal_(value)
    with isa(name):
        assert not cpu.finite_rows(x).any()
        assert cpu.finite_rows(torch.full((85, 85), -3.4e38)).all()


def test_faults() -> None:
    for x in (torch.zeros(3), torch.zeros(2, 3).bfloat16()):
        with pytest.raises(ValueError, match="must be float32"):
            finite_rows(x)
