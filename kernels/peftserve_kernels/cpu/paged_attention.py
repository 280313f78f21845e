"""paged_attention in C++: a running softmax over blocks of 64 positions, read in place from their pages."""

from typing import TYPE_CHECKING

from torch import Tensor

from peftserve_kernels.cpu.extension import DTYPES, ops
from peftserve_kernels.cpu.tape import empty
from peftserve_kernels.cpu.threads import threads

if TYPE_CHECKING:
    from peftserve_kernels.paged_attention import AttentionBatch


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: "AttentionBatch",
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """See `peftserve_kernels.paged_attention`. The caches and the tables of `batch` must be contiguous.

    A row goes over its positions in ascending order, in blocks counted from position 0: its bits are the same as a
    decode step, in a whole prefill, in any chunk of it, and beside any other sequences.
    """
    tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    tables = batch.block_tables
    sequences, max_blocks = tables.shape
    q = q.contiguous()
    out = empty((tokens, num_heads * head_dim), q.dtype)
    ops.paged_attention(
        q.data_ptr(),
        out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        tables.data_ptr(),
        batch.query_start.data_ptr(),
        batch.context_len.data_ptr(),
        DTYPES[q.dtype],
        DTYPES[k_cache.dtype],
        tokens,
        sequences,
        max_blocks,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        sliding_window or 0,
        scale,
        threads(),
    )
    return out
