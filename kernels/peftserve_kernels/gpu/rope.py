"""rope_and_store_kv in Triton: one launch, a few heads of one token a program."""

from typing import Final, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.device import rounded
from peftserve_kernels.gpu.launch import launch

# Elements of the two halves of its heads that a program of 4 warps holds: 8 of each a thread, 16 bytes in bf16.
_HALF_ELEMENTS: Final = 1024


class RopeChoice(NamedTuple):
    """`heads` heads a program, their halves padded to `block_half` elements: powers of two."""

    heads: int
    block_half: int
    num_warps: int


def rope_choice(total_heads: int, head_dim: int) -> RopeChoice:
    """For `total_heads` heads a token, those of q, k and v together."""
    block_half = triton.next_power_of_2(head_dim // 2)
    heads = min(max(_HALF_ELEMENTS // block_half, 1), triton.next_power_of_2(total_heads))
    return RopeChoice(heads, block_half, min(max(heads * block_half // 256, 1), 8))


@triton.jit
def rope_and_store_kv_kernel(  # type: ignore[no-untyped-def]
    qkv,
    cos_sin,
    k_cache,
    v_cache,
    slots,
    q_out,
    q_norm,
    k_norm,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    Q_NORMED: tl.constexpr,
    K_NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    QK_HEADS: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    ALL_HEADS: tl.constexpr = QK_HEADS + NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK_HALF)
    in_half = column < HALF
    inside = (head < ALL_HEADS)[:, None] & in_half[None, :]
    is_q, is_v = head < NUM_HEADS, head >= QK_HEADS

    source = qkv + token * (ALL_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + column[None, :]
    a_raw = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b_raw = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    a, b = a_raw, b_raw
    if Q_NORMED or K_NORMED:
        factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        if Q_NORMED:
            qa = tl.load(q_norm + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
            qb = tl.load(q_norm + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
            a = tl.where(is_q[:, None], a_raw * factor * qa, a)
            b = tl.where(is_q[:, None], b_raw * factor * qb, b)
        if K_NORMED:
            ka = tl.load(k_norm + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
            kb = tl.load(k_norm + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
            a = tl.where(is_q[:, None], a, a_raw * factor * ka)
            b = tl.where(is_q[:, None], b, b_raw * factor * kb)
    if ROTATED:
        angle = cos_sin + token * HEAD_DIM + column
        cos = tl.load(angle, mask=in_half, other=0.0)[None, :]
        sin = tl.load(angle + HALF, mask=in_half, other=0.0)[None, :]
        a, b = a * cos - b * sin, b * cos + a * sin
    a = tl.where(is_v[:, None], a_raw, a)
    b = tl.where(is_v[:, None], b_raw, b)

    q_row = q_out + token * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + column[None, :]
    tl.store(q_row, rounded(a, q_out.dtype.element_ty), mask=is_q[:, None] & inside)
    tl.store(q_row + HALF, rounded(b, q_out.dtype.element_ty), mask=is_q[:, None] & inside)

    slot = tl.load(slots + token).to(tl.int64) + tl.zeros((HEADS,), tl.int64)
    stored = inside & (slot >= 0)[:, None]
    kv_head = tl.where(is_v, head - QK_HEADS, head - NUM_HEADS)
    cache_row = (slot // PAGE_SIZE * NUM_KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE
    at = cache_row[:, None] * HEAD_DIM + column[None, :]
    is_k = (head >= NUM_HEADS) & (head < QK_HEADS)
    tl.store(k_cache + at, rounded(a, k_cache.dtype.element_ty), mask=is_k[:, None] & stored)
    tl.store(k_cache + at + HALF, rounded(b, k_cache.dtype.element_ty), mask=is_k[:, None] & stored)
    tl.store(v_cache + at, rounded(a, k_cache.dtype.element_ty), mask=is_v[:, None] & stored)
    tl.store(v_cache + at + HALF, rounded(b, k_cache.dtype.element_ty), mask=is_v[:, None] & stored)


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
    """See `peftserve_kernels.rope_and_store_kv`. Raises ValueError unless the caches are contiguous."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache, v_cache: must be contiguous")
    qkv, slots = qkv.contiguous(), slots.contiguous()
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, num_heads, head_dim)
    if not tokens:
        return q
    total_heads = num_heads + 2 * num_kv_heads
    choice = rope_choice(total_heads, head_dim)
    launch(
        rope_and_store_kv_kernel,
        (tokens, triton.cdiv(total_heads, choice.heads)),
        qkv,
        # what is absent is not read
        qkv if cos_sin is None else cos_sin.contiguous(),
        k_cache,
        v_cache,
        slots,
        q,
        qkv if q_norm is None else q_norm.contiguous(),
        qkv if k_norm is None else k_norm.contiguous(),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=k_cache.shape[2],
        ROTATED=cos_sin is not None,
        Q_NORMED=q_norm is not None,
        K_NORMED=k_norm is not None,
        HEADS=choice.heads,
        BLOCK_HALF=choice.block_half,
        num_warps=choice.num_warps,
    )
    return q
