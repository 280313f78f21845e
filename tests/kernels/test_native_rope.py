from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peftserve_kernels.cpu.rope import rope_and_store_kv
from peftserve_kernels.rope import rope_and_store_kv_reference
from tests.kernels.native import ISAS, isa, same_bits, threads
from tests.kernels.rounding import assert_rounded_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


def caches(page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.full((64 // page_size, kv_heads, page_size, head_dim), 9.0, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (9, 3, 64), (5, 1, 6), (4, 4, 34)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_against_the_reference(
    dtype: torch.dtype, cache_dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, normed: bool, rotated: bool
) -> None:
    norms = [torch.randn(head_dim) if normed else None for _ in range(2)]
    for tokens, page_size in ((0, 16), (1, 1), (33, 16)):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
        angles = torch.rand(tokens, head_dim // 2) * 6
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1) if rotated else None
        slots = torch.randperm(64)[:tokens]
        slots[3::7] = -1
        ours, wanted = (caches(page_size, kv_heads, head_dim, cache_dtype) for _ in range(2))
        arguments = (slots, heads, kv_heads, head_dim, *norms, 1e-6)
        q = rope_and_store_kv(qkv, cos_sin, *ours, *arguments)
        wanted_q = rope_and_store_kv_reference(qkv, cos_sin, *wanted, *arguments)
        assert q.dtype == dtype
        # the reference rounds as well: one place between the two where they fall on different sides
        for ours_, wanted_ in ((q, wanted_q), *zip(ours, wanted, strict=True)):
            assert_rounded_once(ours_, wanted_, rtol=torch.finfo(ours_.dtype).eps, atol=1e-5)


def test_a_token_has_the_same_bits_in_every_batch() -> None:
    qkv, angles = torch.randn(200, 15 * 64).bfloat16(), torch.rand(200, 32)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    slots = torch.randperm(256)[:200]

    def run(start: int, end: int) -> tuple[Tensor, ...]:
        k_cache, v_cache = torch.zeros(2, 16, 3, 16, 64, dtype=torch.bfloat16).unbind()
        part = slice(start, end)
        q = rope_and_store_kv(qkv[part], cos_sin[part], k_cache, v_cache, slots[part], 9, 3, 64)
        page, offset = slots[part] // 16, slots[part] % 16
        return q, k_cache[page, :, offset], v_cache[page, :, offset]

    whole = run(0, 200)
    for start, end in ((0, 1), (199, 200), (3, 150)):
        for count in (1, 2, 3):
            with threads(count):
                for part, all_ in zip(run(start, end), whole, strict=True):
                    assert same_bits(part, all_[start:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_of_number_is_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """Values are only converted on their way to the cache: all exponents, ties, the ends of the range, infinities."""
    patterns = torch.arange(0, 2**31, 65521).to(torch.int32).view(torch.float32)
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 3.39e38, 0.0, 1.00390625, 1.01171875, 6e-8, 2.9e-8, 5.96e-8])
    values = torch.cat([patterns, edges])
    values = values[(values == 0) | (values >= 2**-126) | values.isnan()]  # AVX-512 rounds subnormals to zero
    values = torch.cat([values, -values])
    values = values[: len(values) // 64 * 64].view(-1, 1, 64)
    tokens = len(values)
    qkv = torch.cat((torch.zeros(tokens, 2, 64), values), dim=1).view(tokens, -1)
    k_cache, v_cache = torch.zeros(2, tokens, 1, 1, 64, dtype=dtype).unbind()
    rope_and_store_kv(qkv, None, k_cache, v_cache, torch.arange(tokens), 1, 1, 64)
    wanted = values.to(dtype)
    assert torch.equal(v_cache[:, :, 0].nan_to_num(1.5), wanted.nan_to_num(1.5))
    assert torch.equal(v_cache[:, :, 0].isnan(), wanted.isnan())


def test_caches_must_be_contiguous() -> None:
    cache = torch.zeros(2, 1, 4, 16)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        rope_and_store_kv(torch.zeros(1, 24), None, cache, cache, torch.tensor([0]), 1, 1, 8)
