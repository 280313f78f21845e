"""paged_attention in Triton: split-KV decode and tiles of prefill, with running softmaxes over blocks of positions.

Decode: a program has up to 16 heads of one query that share a KV head, and goes over splits of its positions, each with
a softmax of its own; a second launch merges the splits of a query in ascending order (Flash-Decoding). Prefill: a
program has rows (query, head) of one tile of queries and one KV head, and goes over its positions once (Dao 2023,
arXiv:2307.08691). The running softmax is Milakov and Gimelshein's (2018, arXiv:1805.02867).

Splits (`decode_splits`) and blocks are counted from position 0 of a sequence, and a split's length depends on that
sequence alone, so a row adds in the same order beside any other sequences and in any tile. A decode step and a prefill
of the same query round differently.
"""

import math
from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor

from peftserve_kernels.gpu.attention_kernels import (
    decode_attention_kernel,
    merge_splits_kernel,
    prefill_attention_kernel,
)
from peftserve_kernels.gpu.decode_splits import MOST_SPLITS, SPLIT, max_splits
from peftserve_kernels.gpu.launch import Target, current_target, launch
from peftserve_kernels.paged_attention import QUERY_TILE, AttentionBatch

# Splits merged at a time.
_MERGE_SPLITS: Final = 16

# Programs of a decode launch, at most, unless a split each is fewer: several for each place on the chip, since those
# past the end of a short context leave at once and a long context is shared by as many as there are.
_DECODE_PROGRAMS: Final = 4096


class AttentionChoice(NamedTuple):
    """`rows` (query, head) pairs a program, `keys` positions a block. A row's bits depend on `keys`."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class _Entry(NamedTuple):
    backend: str
    min_arch: int
    bytes: int  # of an element
    max_head_dim: int  # padded to a power of two
    decode: AttentionChoice
    prefill: AttentionChoice


# The first entry that fits is taken. Shared memory bounds keys * head_dim * stages, registers rows * head_dim / warps.
# Pages are looked up one stage before keys and values are copied, so that 5 stages hold two blocks of those.
_CHOICES: Final = (
    _Entry("cuda", 0, 2, 32, AttentionChoice(16, 32, 4, 5), AttentionChoice(128, 32, 8, 5)),
    _Entry("cuda", 0, 2, 64, AttentionChoice(16, 64, 4, 5), AttentionChoice(128, 64, 8, 5)),
    _Entry("cuda", 90, 2, 128, AttentionChoice(16, 64, 4, 5), AttentionChoice(128, 64, 8, 5)),
    _Entry("cuda", 0, 2, 128, AttentionChoice(16, 64, 4, 5), AttentionChoice(128, 32, 8, 5)),
    _Entry("cuda", 0, 2, 256, AttentionChoice(16, 32, 8, 5), AttentionChoice(64, 32, 8, 5)),
    _Entry("cuda", 0, 2, 512, AttentionChoice(16, 16, 8, 4), AttentionChoice(16, 16, 8, 4)),
    _Entry("cuda", 0, 4, 128, AttentionChoice(16, 16, 8, 4), AttentionChoice(16, 16, 4, 4)),
    _Entry("cuda", 0, 4, 256, AttentionChoice(16, 16, 8, 2), AttentionChoice(16, 16, 8, 1)),
    _Entry("hip", 0, 2, 32, AttentionChoice(16, 32, 4, 2), AttentionChoice(32, 32, 4, 1)),  # two stages spill
    _Entry("hip", 0, 2, 128, AttentionChoice(16, 32, 4, 2), AttentionChoice(32, 32, 4, 2)),
    _Entry("hip", 0, 2, 512, AttentionChoice(16, 16, 4, 1), AttentionChoice(16, 16, 4, 1)),
    _Entry("hip", 0, 4, 256, AttentionChoice(16, 16, 4, 1), AttentionChoice(16, 16, 4, 1)),
)


def attention_choice(target: Target, dtype: torch.dtype, head_dim: int) -> tuple[AttentionChoice, AttentionChoice]:
    """For decode and for prefill; `dtype` is the one computed in. Nothing here may depend on a batch."""
    arch = target.arch if isinstance(target.arch, int) else 0
    padded = _padded(head_dim)
    for entry in _CHOICES:
        fits = entry.backend == target.backend and arch >= entry.min_arch
        if fits and dtype.itemsize <= entry.bytes and padded <= entry.max_head_dim:
            return entry.decode, entry.prefill
    raise ValueError(f"no attention kernel for {target}, {dtype}, head_dim {head_dim}")


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """See `peftserve_kernels.paged_attention`.

    One launch for decode and, where a block table may hold more than one split, one to merge them; one for prefill.
    With operands of bfloat16 or float16 the weights are rounded to that before they meet the values.
    Raises ValueError for caches that are not contiguous, a scale <= 0 or a batch without `decode` and `prefill`.
    """
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache, v_cache: must be contiguous")
    if scale <= 0:
        raise ValueError(f"scale: must be positive, got {scale}")
    if batch.decode is None or batch.prefill is None:
        raise ValueError("batch: has no queries cut for Triton (`cut_queries`)")
    tokens, num_heads, head_dim = q.shape
    q = q.contiguous()
    # Where every row is a decode step's, as in a captured one, there are none past the last sequence to be zeroed.
    all_decode = batch.decode.shape[0] == tokens
    out = q.new_empty(tokens, num_heads, head_dim) if all_decode else q.new_zeros(tokens, num_heads, head_dim)
    call = _Call(q, k_cache, v_cache, out, batch, scale * math.log2(math.e), sliding_window or 0)
    compute = torch.float32 if call.upcast else q.dtype
    decode, prefill = attention_choice(current_target(q.device), compute, head_dim)
    if batch.decode.shape[0]:
        _decode(call, batch.decode, decode)
    if batch.prefill.shape[0]:
        _prefill(call, batch.prefill, prefill)
    return out.view(tokens, num_heads * head_dim)


class _Call(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    out: Tensor
    batch: AttentionBatch
    log2_scale: float
    window: int  # 0 for none

    @property
    def upcast(self) -> bool:
        """Operands of two dtypes meet in float32."""
        return self.q.dtype != self.k_cache.dtype

    def constants(self, choice: AttentionChoice) -> dict[str, int]:
        _, num_kv_heads, page_size, head_dim = self.k_cache.shape
        return {
            "NUM_HEADS": self.q.shape[1],
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "PAGE_SIZE": page_size,
            "WINDOW": self.window,
            "UPCAST": self.upcast,
            "ROWS": choice.rows,
            "BLOCK_KEYS": choice.keys,
            "BLOCK_DIM": _padded(head_dim),
        }


def _decode(call: _Call, decode: Tensor, choice: AttentionChoice) -> None:
    _, num_heads, head_dim = call.q.shape
    _, num_kv_heads, page_size, _ = call.k_cache.shape
    items, table_width = decode.shape[0], call.batch.block_tables.shape[1]
    num_splits = max_splits(table_width * page_size, call.window)
    shape = (items, num_heads, num_splits) if num_splits > 1 else (0,)
    split_acc = torch.empty((*shape, head_dim), dtype=torch.float32, device=call.q.device)
    split_top, split_total = (torch.empty(shape, dtype=torch.float32, device=call.q.device) for _ in range(2))
    across = items * num_kv_heads * triton.cdiv(num_heads // num_kv_heads, choice.rows)
    launch(
        decode_attention_kernel,
        (across, min(num_splits, triton.cdiv(_DECODE_PROGRAMS, across))),
        call.q,
        call.k_cache,
        call.v_cache,
        call.out,
        split_acc,
        split_top,
        split_total,
        call.batch.block_tables,
        call.batch.query_start,
        call.batch.context_len,
        decode,
        call.log2_scale,
        table_width,
        num_splits,
        **call.constants(choice),
        SPLIT=SPLIT,
        MOST_SPLITS=MOST_SPLITS,
        ONE_SPLIT=num_splits == 1,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    if num_splits > 1:
        launch(
            merge_splits_kernel,
            (items * num_heads,),
            split_acc,
            split_top,
            split_total,
            call.out,
            call.batch.query_start,
            call.batch.context_len,
            decode,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            WINDOW=call.window,
            SPLIT=SPLIT,
            MOST_SPLITS=MOST_SPLITS,
            BLOCK_SPLITS=_MERGE_SPLITS,
            BLOCK_DIM=_padded(head_dim),
            num_warps=4,
        )


def _prefill(call: _Call, prefill: Tensor, choice: AttentionChoice) -> None:
    num_heads, num_kv_heads = call.q.shape[1], call.k_cache.shape[1]
    parts = triton.cdiv(QUERY_TILE * (num_heads // num_kv_heads), choice.rows)
    launch(
        prefill_attention_kernel,
        (prefill.shape[0] * parts, num_kv_heads),
        call.q,
        call.k_cache,
        call.v_cache,
        call.out,
        call.batch.block_tables,
        call.batch.query_start,
        call.batch.context_len,
        prefill,
        call.log2_scale,
        call.batch.block_tables.shape[1],
        **call.constants(choice),
        QUERY_TILE=QUERY_TILE,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
