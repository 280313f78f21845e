import pytest
import torch
from torch import Tensor

from peftserve_kernels.gpu.launch import Target, recording
from peftserve_kernels.gpu.rope import rope_and_store_kv, rope_choice
from peftserve_kernels.rope import rope_and_store_kv_reference
from tests.kernels.rounding import assert_rounded_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def caches(page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.full((-(-64 // page_size), kv_heads, page_size, head_dim), 9.0, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (9, 3, 64), (4, 4, 34)])
@pytest.mark.parametrize(
    ("normed", "rotated"), [((False, False), True), ((True, True), True), ((True, False), False), ((False, True), True)]
)
def test_against_the_reference(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    normed: tuple[bool, bool],
    rotated: bool,
) -> None:
    norms = [torch.randn(head_dim).to(dtype) if with_norm else None for with_norm in normed]
    for tokens, page_size in ((0, 16), (1, 1), (5, 3)):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
        angles = torch.rand(tokens, head_dim // 2) * 6
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1) if rotated else None
        slots = torch.randperm(64)[:tokens]
        slots[2:3] = -1
        ours, wanted = (caches(page_size, kv_heads, head_dim, cache_dtype) for _ in range(2))
        arguments = (slots, heads, kv_heads, head_dim, *norms, 1e-6)
        q = rope_and_store_kv(qkv, cos_sin, *ours, *arguments)
        wanted_q = rope_and_store_kv_reference(qkv, cos_sin, *wanted, *arguments)
        assert q.dtype == dtype
        # the reference rounds as well: one place between the two where they fall on different sides
        for ours_, wanted_ in ((q, wanted_q), *zip(ours, wanted, strict=True)):
            assert_rounded_once(ours_, wanted_, rtol=torch.finfo(ours_.dtype).eps, atol=1e-5)


def test_caches_must_be_contiguous() -> None:
    cache = torch.zeros(2, 1, 4, 16)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        rope_and_store_kv(torch.zeros(1, 24), None, cache, cache, torch.tensor([0]), 1, 1, 8)


@pytest.mark.parametrize(
    ("total_heads", "head_dim", "choice"),
    [(48, 128, (16, 64, 4)), (15, 64, (16, 32, 2)), (3, 2, (4, 1, 1)), (20, 4096, (1, 2048, 8))],
)
def test_choice(total_heads: int, head_dim: int, choice: tuple[int, int, int]) -> None:
    assert rope_choice(total_heads, head_dim) == choice


def test_one_launch() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cache = meta(4, 8, 16, 128)
    for tokens in (0, 7):
        angles, slots = meta(tokens, 128, dtype=torch.float32), meta(tokens, dtype=torch.int64)
        with recording(Target("cuda", 80)) as launches:
            q = rope_and_store_kv(meta(tokens, 48 * 128), angles, cache, cache, slots, 32, 8, 128)
        assert q.shape == (tokens, 32, 128)
        assert [launch.grid for launch in launches] == ([(7, 3)] if tokens else [])
