import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peftserve_kernels.gpu.launch import TARGETS, Target, recording
from peftserve_kernels.gpu.linear import launch_config, linear_logits
from tests.kernels.native import same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x: Tensor, weight: Tensor) -> None:
    logits = linear_logits(x, weight)
    assert logits.dtype == torch.float32
    assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "size"), [(0, 50, 64), (1, 1, 64), (3, 197, 192), (9, 65, 576), (70, 130, 100)]
)
def test_products_of_stored_values_in_float32(dtype: torch.dtype, rows: int, vocab: int, size: int) -> None:
    check(torch.randn(rows, size).to(dtype), torch.randn(vocab, size).to(dtype))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70),
    vocab=st.integers(1, 150),
    size=st.integers(1, 200),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_any_shape_and_mixed_dtypes(rows: int, vocab: int, size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(torch.randn(rows, size).to(dtypes[0]), torch.randn(vocab, size).to(dtypes[1]))


def test_views() -> None:
    check(torch.randn(4, 128)[:, ::2], torch.randn(64, 20).t())
    check(torch.randn(4, 128)[:, 32:96], torch.randn(20, 128)[:, 64:])


def test_a_broken_row_disturbs_no_other() -> None:
    x, weight = torch.randn(12, 128).bfloat16(), torch.randn(70, 128).bfloat16()
    clean = linear_logits(x, weight)
    x[5] = torch.nan
    logits = linear_logits(x, weight)
    assert logits[5].isnan().all()
    rest = [i for i in range(12) if i != 5]
    assert same_bits(logits[rest], clean[rest])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_launch_choice(target: Target, dtype: torch.dtype) -> None:
    for tokens in (1, 8, 16, 33, 64, 65, 512):
        x = torch.empty(tokens, 576, dtype=dtype, device="meta")
        with recording(target) as launches:
            logits = linear_logits(x, torch.empty(49152, 576, dtype=dtype, device="meta"))
        assert logits.shape == (tokens, 49152)
        (launch,) = launches
        config = launch_config(target.backend, dtype, tokens)
        assert launch.grid == (-(-tokens // config.block_m), 49152 // config.block_n)
        assert launch.constants["IN_FLOAT32"] == (dtype == torch.float32)
        assert launch.constants["HAS_REST"] == (576 % config.block_k != 0)
        if dtype != torch.float32 and tokens <= 64:
            assert launch.grid[0] == 1  # W is read once
