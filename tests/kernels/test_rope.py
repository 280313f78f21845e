import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from peftserve_kernels import rope_and_store_kv
from tests.kernels.rounding import assert_rounded_once


def table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos_sin as the op wants it, and cos and sin as transformers does ([1, M, head_dim], both halves)."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = positions[:, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, sin), -1), torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]


def empty_caches(pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (pages, kv_heads, page_size, head_dim)
    return torch.full(shape, 9.0, dtype=dtype), torch.full(shape, 9.0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (9, 3, 64), (5, 1, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_against_transformers(
    dtype: torch.dtype, page_size: int, tokens: int, heads: int, kv_heads: int, head_dim: int, normed: bool
) -> None:
    pages = 64 // page_size
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    by_head = qkv.float().view(1, tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = torch.split(by_head, [heads, kv_heads, kv_heads], dim=2)
    cos_sin, cos, sin = table(torch.randint(0, 500, (tokens,)), head_dim)
    slots = torch.randperm(64)[:tokens]
    k_cache, v_cache = empty_caches(pages, kv_heads, page_size, head_dim, dtype)
    norms = [LlamaRMSNorm(head_dim, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    weights = [norm.weight.detach() for norm in norms] if normed else [None, None]

    out = rope_and_store_kv(
        qkv, cos_sin, k_cache, v_cache, slots, heads, kv_heads, head_dim, weights[0], weights[1], 1e-6
    )

    if normed:
        q, k = norms[0](q).detach(), norms[1](k).detach()
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert out.dtype == dtype
    assert_rounded_once(out, q[0])
    untouched = torch.ones(pages, page_size, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, page_size)
        untouched[page, offset] = False
        assert_rounded_once(k_cache[page, :, offset], k[0, token])
        assert torch.equal(v_cache[page, :, offset], v[0, token].to(dtype))
    for cache in (k_cache, v_cache):
        assert (cache.transpose(1, 2)[untouched] == 9.0).all()


def test_without_positions_nothing_is_rotated() -> None:
    qkv = torch.randn(3, 4 * 8)
    k_cache, v_cache = empty_caches(2, 1, 4, 8, torch.float32)
    q = rope_and_store_kv(qkv, None, k_cache, v_cache, torch.tensor([0, 5, 2]), 2, 1, 8)
    assert torch.equal(q.flatten(1), qkv[:, :16])
    assert torch.equal(k_cache[1, 0, 1], qkv[1, 16:24])
    assert torch.equal(v_cache[0, 0, 2], qkv[2, 24:])


def test_a_negative_slot_stores_nothing() -> None:
    qkv = torch.randn(3, 4 * 8)
    k_cache, v_cache = empty_caches(2, 1, 4, 8, torch.float32)
    q = rope_and_store_kv(qkv, None, k_cache, v_cache, torch.tensor([-1, 6, -9]), 2, 1, 8)
    assert torch.equal(q.flatten(1), qkv[:, :16])
    assert torch.equal(k_cache[1, 0, 2], qkv[1, 16:24])
    for cache in (k_cache, v_cache):
        assert (cache == 9.0).sum() == 7 * 8


def test_faults() -> None:
    k_cache, v_cache = empty_caches(2, 1, 4, 8, torch.float32)
    qkv, cos_sin, slots = torch.zeros(3, 32), torch.zeros(3, 8), torch.arange(3)
    with pytest.raises(ValueError, match=r"qkv: must be \[M, 40\]"):
        rope_and_store_kv(qkv, cos_sin, k_cache, v_cache, slots, 3, 1, 8)
    with pytest.raises(ValueError, match=r"cos_sin: must be \[3, 8\]"):
        rope_and_store_kv(qkv, cos_sin[:2], k_cache, v_cache, slots, 2, 1, 8)
    with pytest.raises(ValueError, match=r"slots: must be \[3\]"):
        rope_and_store_kv(qkv, cos_sin, k_cache, v_cache, slots[:2], 2, 1, 8)
    with pytest.raises(ValueError, match="k_cache, v_cache"):
        rope_and_store_kv(qkv, cos_sin, k_cache, v_cache[:1], slots, 2, 1, 8)
    with pytest.raises(ValueError, match="head_dim: must be even"):
        rope_and_store_kv(torch.zeros(3, 28), None, k_cache, v_cache, slots, 2, 1, 7)
