import pytest
import torch

from peftserve_kernels import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[], [0], [6, 0, 6, 3]])
def test_rows_of_the_table_exactly(dtype: torch.dtype, ids: list[int]) -> None:
    table = torch.randn(7, 5).to(dtype)
    y = embedding(torch.tensor(ids, dtype=torch.int64), table)
    assert y.dtype == torch.float32
    assert y.shape == (len(ids), 5)
    for row, token in zip(y, ids, strict=True):
        assert torch.equal(row, table[token].float())


def test_faults() -> None:
    with pytest.raises(ValueError, match="ids must be integers"):
        embedding(torch.zeros(3), torch.zeros(7, 5))
    with pytest.raises(IndexError):
        embedding(torch.tensor([7]), torch.zeros(7, 5))
