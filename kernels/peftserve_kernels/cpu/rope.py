"""rope_and_store_kv in C++."""

from torch import Tensor

from peftserve_kernels.cpu.extension import DTYPES, address, ops
from peftserve_kernels.cpu.tape import empty
from peftserve_kernels.cpu.threads import threads


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
    rows = qkv.shape[0]
    qkv, slots = qkv.contiguous(), slots.long().contiguous()
    cos_sin, q_norm, k_norm = (None if x is None else x.float().contiguous() for x in (cos_sin, q_norm, k_norm))
    q = empty((rows, num_heads, head_dim), qkv.dtype)
    ops.rope_and_store_kv(
        qkv.data_ptr(),
        address(cos_sin),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        address(q_norm),
        address(k_norm),
        DTYPES[qkv.dtype],
        DTYPES[k_cache.dtype],
        rows,
        num_heads,
        num_kv_heads,
        head_dim,
        k_cache.shape[2],
        eps,
        threads(),
    )
    return q
