import pytest
import torch
from torch.testing import assert_close

from peftserve_kernels import linear_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "size"), [(0, 50, 64), (1, 1, 64), (3, 4097, 192), (9, 2001, 576)])
def test_products_of_stored_values_in_float32(dtype: torch.dtype, rows: int, vocab: int, size: int) -> None:
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(vocab, size).to(dtype)
    logits = linear_logits(x, weight)
    assert logits.dtype == torch.float32
    assert logits.shape == (rows, vocab)
    assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)


def test_mixed_dtypes() -> None:
    x, weight = torch.randn(2, 64), torch.randn(10, 64).bfloat16()
    assert_close(linear_logits(x, weight), x @ weight.float().t(), rtol=1e-5, atol=1e-5)


def test_faults() -> None:
    with pytest.raises(ValueError, match=r"do not fit: \[2, 3\] and \[5, 4\]"):
        linear_logits(torch.zeros(2, 3), torch.zeros(5, 4))
