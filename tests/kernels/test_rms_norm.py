import pytest
import torch
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftserve_kernels import rms_norm
from tests.kernels.rounding import assert_rounded_once


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 577), (65, 576)])
def test_against_transformers(in_dtype: torch.dtype, out_dtype: torch.dtype, rows: int, size: int) -> None:
    oracle = LlamaRMSNorm(size, eps=1e-5)
    torch.nn.init.normal_(oracle.weight)
    x = (torch.randn(rows, size) * 3).to(in_dtype)
    y = rms_norm(x, oracle.weight.detach(), 1e-5, out_dtype)
    assert y.dtype == out_dtype
    assert_rounded_once(y, oracle(x.float()).detach(), atol=1e-6)


def test_eps_keeps_zero_rows_finite_and_counts() -> None:
    assert not rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-5, torch.float32).any()
    tiny = rms_norm(torch.full((1, 4), 1e-3), torch.ones(4), 1e-6, torch.float32)
    assert_close(tiny, torch.full((1, 4), 0.5**0.5))


def test_the_input_is_not_changed() -> None:
    x = torch.randn(3, 8)
    before = x.clone()
    rms_norm(x, torch.ones(8), 1e-5, torch.float32)
    assert torch.equal(x, before)


def test_faults() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-5, torch.float32)
