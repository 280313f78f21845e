"""paged_attention: causal attention of the new tokens over keys and values in pages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import paged_attention as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op

QUERY_TILE: Final = 128
"""Most queries of one sequence in a row of `AttentionBatch.prefill`. Triton programs cut it further."""

# A long prefill is cut into blocks of queries: each reads only the positions that it may see, and masks stay small.
_QUERY_BLOCK: Final = 128

# Keys gathered at a time for several sequences (1 MiB in float32), so that they stay in a core's cache.
_GATHER_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True, eq=False, slots=True)
class AttentionBatch:
    """The S sequences of a batch, the same for all layers of a step.

    block_tables: int32 [S, max_blocks], the KV page of positions i * page_size ... in column i; entries past a
    sequence's context are not read, but must be valid page ids (0 will do). query_start: int32 [S + 1], sequence s
    has the queries query_start[s] .. query_start[s + 1] of the flat batch, which starts at 0. context_len: int32 [S],
    positions in the cache, the new tokens included. A sequence may have no query. All on the compute device.

    The work of the Triton kernels, made by `cut_queries` (None where no Triton backend reads it): decode: int32 [D],
    the sequences with exactly one query; prefill: int32 [T, 3], the queries of all other sequences in tiles (sequence,
    first query, end query) of the flat batch, at most `QUERY_TILE` queries each.

    Where a captured step replays with these tables refilled in place (`for_decode`), its unused rows are sequences of
    one query and context 0: they read nothing and come out as zeros. Only the reference and Triton take such rows.
    """

    block_tables: Tensor
    query_start: Tensor
    context_len: Tensor
    decode: Tensor | None = None
    prefill: Tensor | None = None
    # what the reference derives from the tables, made once a step and used by every layer
    _memo: dict[tuple[int, int, int, int, int | None], "tuple[_Group, ...]"] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        query_start: Sequence[int],
        context_len: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> "AttentionBatch":
        """From host lists; block tables of different lengths are padded. Raises ValueError when they do not agree."""
        count = len(context_len)
        if len(block_tables) != count or len(query_start) != count + 1 or query_start[0] != 0:
            raise ValueError(
                f"{count} contexts need {count} block tables (got {len(block_tables)}) "
                f"and {count + 1} query starts from 0 (got {list(query_start)})"
            )
        for sequence, ((first, end), context) in enumerate(zip(pairwise(query_start), context_len, strict=True)):
            if not 0 <= end - first <= context:
                raise ValueError(f"sequence {sequence}: {end - first} queries in a context of {context}")
        width = max((len(table) for table in block_tables), default=0)
        padded = [[*table, *[0] * (width - len(table))] for table in block_tables]
        decode, prefill = cut_queries(np.asarray(query_start, np.int32))
        return cls(
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(count, width),
            query_start=torch.tensor(query_start, dtype=torch.int32, device=device),
            context_len=torch.tensor(context_len, dtype=torch.int32, device=device),
            decode=torch.from_numpy(decode).to(device),
            prefill=torch.from_numpy(prefill).to(device),
        )

    @classmethod
    def for_decode(cls, capacity: int, max_blocks: int, device: torch.device | str = "cpu") -> "AttentionBatch":
        """Tables of a captured decode step: `capacity` rows of one query each, all unused so far.

        Between replays only `block_tables` and `context_len` change.
        """
        return cls(
            block_tables=torch.zeros((capacity, max_blocks), dtype=torch.int32, device=device),
            query_start=torch.arange(capacity + 1, dtype=torch.int32, device=device),
            context_len=torch.zeros(capacity, dtype=torch.int32, device=device),
            decode=torch.arange(capacity, dtype=torch.int32, device=device),
            prefill=torch.empty((0, 3), dtype=torch.int32, device=device),
        )


def cut_queries(query_start: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`AttentionBatch.decode` and `AttentionBatch.prefill` of the sequences that `query_start` [S + 1] bounds."""
    queries = np.diff(query_start)
    decode = np.flatnonzero(queries == 1).astype(np.int32)
    many = np.flatnonzero(queries > 1)
    tiles = -(-queries[many] // QUERY_TILE)
    sequence = np.repeat(many, tiles)
    tile_in_sequence = np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = query_start[sequence] + QUERY_TILE * tile_in_sequence
    end = np.minimum(first + QUERY_TILE, query_start[sequence + 1])
    return decode, np.stack((sequence, first, end), axis=1).astype(np.int32)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """softmax(scale q K^T) V for each query over its own sequence's pages, causal.

    q: [M, num_heads, head_dim]; k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim]; num_heads is a
    multiple of num_kv_heads, head h reads KV head h // (num_heads / num_kv_heads). Query j of the n queries of a
    sequence sits at position p = context_len - n + j and sees positions 0 .. p, with a `sliding_window` w only those
    > p - w. The new tokens' keys and values are in the cache already. Virtual tokens of a prefix adapter are
    positions like any other.

    Returns [M, num_heads * head_dim] in q's dtype; float32 inside, rounded once. Not in place. Rows past the last
    sequence are padding and come out as zeros. What stale positions of a page hold (anything, NaN too) has no
    influence.
    Raises ValueError when the shapes do not fit.
    """
    if q.ndim != 3 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape or q.shape[2] != k_cache.shape[3]:
        shapes = f"{list(q.shape)}, {list(k_cache.shape)}, {list(v_cache.shape)}"
        raise ValueError(f"q [M, H, hd] and caches [pages, KV, page_size, hd] do not fit: {shapes}")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} heads are no multiple of {k_cache.shape[1]} KV heads")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: must be at least 1, got {sliding_window}")
    return select(_IMPLEMENTATIONS, q.device)(q, k_cache, v_cache, batch, scale, sliding_window)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Sequences of one query count and similar context together: gather their positions, then torch's attention.

    The heads that share a KV head are extra query rows of it, so that keys are not repeated.
    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    shared = num_heads // num_kv_heads
    out = q.new_zeros(tokens, num_heads, head_dim)
    k_rows, v_rows = k_cache.view(-1, head_dim), v_cache.view(-1, head_dim)
    key = (num_heads, num_kv_heads, page_size, head_dim, sliding_window)
    groups = batch._memo.get(key)
    if groups is None:
        groups = batch._memo[key] = tuple(_groups(batch, num_kv_heads, page_size, head_dim, shared, sliding_window))
    for group in groups:
        size, count = group.tokens.shape
        queries = q[group.tokens].float().view(size, count, num_kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
        keys = k_rows.index_select(0, group.cache_rows).float().view(size, num_kv_heads, -1, head_dim)
        values = v_rows.index_select(0, group.cache_rows).float().view(size, num_kv_heads, -1, head_dim)
        attended = functional.scaled_dot_product_attention(
            queries.reshape(size, num_kv_heads, shared * count, head_dim),
            keys,
            values,
            attn_mask=group.visible.expand(size, num_kv_heads, -1, -1),
            scale=scale,
        )
        by_token = attended.view(size, num_kv_heads, shared, count, head_dim).permute(0, 3, 1, 2, 4)
        out[group.tokens] = by_token.reshape(size, count, num_heads, head_dim).to(q.dtype)
    return out.view(tokens, num_heads * head_dim)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Up to `_QUERY_BLOCK` queries of one sequence and the positions that any of them sees: first .. end."""

    sequence: int
    token: int
    queries: int
    first: int
    end: int


@dataclass(frozen=True, eq=False, slots=True)
class _Group:
    """G pieces of Q queries each, padded to L positions.

    tokens: int64 [G, Q], rows of the flat batch. cache_rows: int64 [G * KV * L], rows of a cache seen as [-1,
    head_dim]. visible: bool [G, 1, shared * Q, L].
    """

    tokens: Tensor
    cache_rows: Tensor
    visible: Tensor


def _pieces(batch: AttentionBatch, window: int | None) -> Iterator[_Piece]:
    starts = batch.query_start.tolist()
    for sequence, context in enumerate(batch.context_len.tolist()):
        queries = starts[sequence + 1] - starts[sequence]
        for block in range(0, queries, _QUERY_BLOCK):
            count = min(_QUERY_BLOCK, queries - block)
            position = context - queries + block
            if position < 0:  # an unused row of a captured step
                continue
            first = 0 if window is None else max(0, position - window + 1)
            yield _Piece(sequence, starts[sequence] + block, count, first, position + count)


def _groups(
    batch: AttentionBatch, num_kv_heads: int, page_size: int, head_dim: int, shared: int, window: int | None
) -> Iterator[_Group]:
    alike: dict[tuple[int, int], list[_Piece]] = {}
    for piece in _pieces(batch, window):
        padded = 1 << (piece.end - piece.first - 1).bit_length()
        alike.setdefault((piece.queries, padded), []).append(piece)
    for (queries, padded), pieces in alike.items():
        size = max(1, _GATHER_ELEMENTS // (padded * num_kv_heads * head_dim))
        for at in range(0, len(pieces), size):
            yield _group(batch, pieces[at : at + size], queries, num_kv_heads, page_size, shared, window)


def _group(
    batch: AttentionBatch,
    pieces: Sequence[_Piece],
    queries: int,
    num_kv_heads: int,
    page_size: int,
    shared: int,
    window: int | None,
) -> _Group:
    device = batch.block_tables.device
    table = torch.tensor([[p.sequence, p.token, p.first, p.end] for p in pieces], device=device)
    sequence, token, first, end = table.unsqueeze(-1).unbind(1)
    length = max(p.end - p.first for p in pieces)
    position = first + torch.arange(length, device=device)
    # Padding reads the first visible position again, never a stale one: 0 * NaN would leak from another request.
    position = torch.where(position < end, position, first)
    page = batch.block_tables[sequence.squeeze(-1)].long().gather(1, position // page_size)
    head = torch.arange(num_kv_heads, device=device).view(1, -1, 1)
    cache_rows = (page.unsqueeze(1) * num_kv_heads + head) * page_size + (position % page_size).unsqueeze(1)

    step = torch.arange(queries, device=device)
    query = (end - queries + step).unsqueeze(-1)
    seen = first.unsqueeze(1) + torch.arange(length, device=device)
    visible = seen <= query
    if window is not None:
        visible &= seen > query - window
    return _Group(
        tokens=token + step,
        cache_rows=cache_rows.flatten(),
        visible=visible.repeat(1, shared, 1).unsqueeze(1),
    )


_PagedAttention = Callable[[Tensor, Tensor, Tensor, AttentionBatch, float, int | None], Tensor]
_IMPLEMENTATIONS: Final[Mapping[Backend, _PagedAttention]] = {
    Backend.REFERENCE: paged_attention_reference,
    **native(cpu.paged_attention),
    **triton_op("paged_attention", "paged_attention"),
}
