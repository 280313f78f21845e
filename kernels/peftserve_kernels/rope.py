"""rope_and_store_kv: rotary embedding of the new queries and keys, and the new keys and values into the KV cache."""

from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import rope as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op


def rope_and_store_kv(
    qkv: Tensor,
    cos_sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Split qkv, normalise and rotate q and k, store k and v, return q.

    qkv: [M, (num_heads + 2 num_kv_heads) head_dim], model dtype, heads of q, then k, then v. cos_sin: float32
    [M, head_dim] for each token's position, the cosines of the head_dim / 2 frequencies and then their sines, or None
    for a layer without positions (NoPE). k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim], written in
    place. slots: int64 [M], where token m goes: page * page_size + offset; they must be distinct. K and V of a token
    with a negative slot are not stored: it is padding of a captured step. q_norm, k_norm: [head_dim] weights of an RMS
    norm per head, done before the rotation (Qwen3), with `eps`; None for no norm.

    Rotation (Su et al. 2021, arXiv:2104.09864, in the rotate-half layout of Llama checkpoints): for halves a, b of a
    head (a, b) -> (a cos - b sin, b cos + a sin). In float32, rounded once. Returns q: [M, num_heads, head_dim] in
    qkv's dtype.
    Raises ValueError when a shape does not fit.
    """
    rows = qkv.shape[0]
    if qkv.ndim != 2 or qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(f"qkv: must be [M, {(num_heads + 2 * num_kv_heads) * head_dim}], got {list(qkv.shape)}")
    if head_dim % 2:
        raise ValueError(f"head_dim: must be even, got {head_dim}")
    if cos_sin is not None and tuple(cos_sin.shape) != (rows, head_dim):
        raise ValueError(f"cos_sin: must be [{rows}, {head_dim}], got {list(cos_sin.shape)}")
    if tuple(slots.shape) != (rows,):
        raise ValueError(f"slots: must be [{rows}], got {list(slots.shape)}")
    if k_cache.shape != v_cache.shape or k_cache.ndim != 4 or k_cache.shape[1::2] != (num_kv_heads, head_dim):
        shapes = f"{list(k_cache.shape)} and {list(v_cache.shape)}"
        raise ValueError(f"k_cache, v_cache: must be [pages, {num_kv_heads}, page_size, {head_dim}], got {shapes}")
    implementation = select(_IMPLEMENTATIONS, qkv.device)
    return implementation(qkv, cos_sin, k_cache, v_cache, slots, num_heads, num_kv_heads, head_dim, q_norm, k_norm, eps)


def rope_and_store_kv_reference(
    qkv: Tensor,
    cos_sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Heads as a dimension; norm and rotation broadcast over them."""
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q = _rotate(_norm(q, q_norm, eps), cos_sin).to(qkv.dtype)
    k = _rotate(_norm(k, k_norm, eps), cos_sin)
    page_size = k_cache.shape[2]
    stored = slots >= 0
    page, offset = slots[stored] // page_size, slots[stored] % page_size
    k_cache[page, :, offset] = k[stored].to(k_cache.dtype)
    v_cache[page, :, offset] = v[stored].to(v_cache.dtype)
    return q


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x.float()
    return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)


def _rotate(x: Tensor, cos_sin: Tensor | None) -> Tensor:
    if cos_sin is None:
        return x
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _RopeAndStoreKv(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor: ...


_IMPLEMENTATIONS: Final[dict[Backend, _RopeAndStoreKv]] = {
    Backend.REFERENCE: rope_and_store_kv_reference,
    **native(cpu.rope_and_store_kv),
    **triton_op("rope", "rope_and_store_kv"),
}
