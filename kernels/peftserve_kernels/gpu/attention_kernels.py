"""The kernels of paged_attention: decode in splits, their merge, and prefill; launched by `gpu.paged_attention`."""

import triton
import triton.language as tl

from peftserve_kernels.gpu.device import dot, rounded


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries,
    k_cache,
    v_cache,
    table,
    kv_head,
    query_position,
    start,
    stop,
    first,
    end,
    top,
    total,
    acc,
    log2_scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The blocks of positions from `start` (a multiple of BLOCK_KEYS) to `stop`, folded into the running softmax.

    top: the largest scaled score so far, in units of log2; total and acc: the sums of weights, and of weights times
    values, relative to it. With MASKED, only positions `first` .. `end` are read, since what lies in stale places would
    leak as 0 * NaN, and a row sees those up to its query's own and inside its window; without, all rows see all.
    """
    column = tl.arange(0, BLOCK_DIM)
    for block in range(start, stop, BLOCK_KEYS):
        position = block + tl.arange(0, BLOCK_KEYS)
        inside = (column < HEAD_DIM)[None, :]
        if MASKED:
            read = (position >= first) & (position < end)
            inside = read[:, None] & inside
            page = tl.load(table + position // PAGE_SIZE, mask=read, other=0)
        else:
            page = tl.load(table + position // PAGE_SIZE)
        cache_row = (page.to(tl.int64) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
        at = cache_row[:, None] * HEAD_DIM + column[None, :]
        if MASKED or HEAD_DIM != BLOCK_DIM:
            keys = tl.load(k_cache + at, mask=inside, other=0.0)
            values = tl.load(v_cache + at, mask=inside, other=0.0)
        else:
            keys = tl.load(k_cache + at)
            values = tl.load(v_cache + at)

        score = dot(queries, tl.trans(keys.to(queries.dtype)), tl.zeros((queries.shape[0], BLOCK_KEYS), tl.float32))
        if MASKED:
            seen = position[None, :] <= query_position[:, None]
            if WINDOW:
                seen &= position[None, :] > query_position[:, None] - WINDOW
            score = tl.where(seen, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * log2_scale)
        base = new_top
        if MASKED:
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
        weight = tl.exp2(score * log2_scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = dot(rounded(weight, queries.dtype), values.to(queries.dtype), acc * shrink[:, None])
        top = new_top
    return top, total, acc


@triton.jit
def _normalized(acc, total, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc / total by rows as DTYPE; zeros for a row that saw nothing."""
    return rounded(acc / tl.where(total == 0.0, 1.0, total)[:, None], DTYPE)


@triton.jit
def _span(context, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions a split: the least multiple of SPLIT of which MOST_SPLITS hold what the query sees."""
    # The window's first position may lie anywhere in a split, which then is one more.
    seen = tl.minimum(context, WINDOW - 1) if WINDOW else context
    return tl.maximum(tl.cdiv(seen, SPLIT * MOST_SPLITS), 1) * SPLIT


@triton.jit(do_not_specialize=["table_width", "num_splits"])
def decode_attention_kernel(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    out,
    split_acc,
    split_top,
    split_total,
    block_tables,
    query_start,
    context_len,
    decode,
    log2_scale,
    table_width,
    num_splits,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program (item, KV head, part of its heads; first split): that split and each num_programs(1)-th after it."""
    SHARED: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PARTS: tl.constexpr = (SHARED + ROWS - 1) // ROWS
    item = (tl.program_id(0) // (NUM_KV_HEADS * PARTS)).to(tl.int64)
    kv_head = tl.program_id(0) // PARTS % NUM_KV_HEADS
    shared = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    head = kv_head * SHARED + shared
    column = tl.arange(0, BLOCK_DIM)
    is_head = shared < SHARED
    inside = is_head[:, None] & (column < HEAD_DIM)[None, :]

    sequence = tl.load(decode + item).to(tl.int64)
    context = tl.load(context_len + sequence)
    first = tl.maximum(context - WINDOW, 0) if WINDOW else context * 0
    span = _span(context, WINDOW, SPLIT, MOST_SPLITS)
    first_split = first // span
    end_split = tl.cdiv(context, span)
    if ONE_SPLIT:
        end_split = first_split + 1  # an unused row has to write its zeros too
    elif first_split + tl.program_id(1) >= end_split:
        return
    table = block_tables + sequence * table_width
    row = (tl.load(query_start + sequence).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + column[None, :]
    queries = tl.load(q + row, mask=inside, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    query_position = tl.zeros((ROWS,), tl.int32) + (context - 1)
    for split in range(first_split + tl.program_id(1), end_split, tl.num_programs(1)):
        top, total, acc = _attend(
            queries,
            k_cache,
            v_cache,
            table,
            kv_head,
            query_position,
            tl.maximum(split * span, first // BLOCK_KEYS * BLOCK_KEYS),
            tl.minimum(split * span + span, context),
            first,
            context,
            tl.full((ROWS,), -float("inf"), tl.float32),
            tl.zeros((ROWS,), tl.float32),
            tl.zeros((ROWS, BLOCK_DIM), tl.float32),
            log2_scale,
            NUM_KV_HEADS,
            HEAD_DIM,
            PAGE_SIZE,
            WINDOW,
            BLOCK_KEYS,
            BLOCK_DIM,
            True,
        )
        if ONE_SPLIT:
            tl.store(out + row, _normalized(acc, total, out.dtype.element_ty), mask=inside)
        else:
            partial = (item * NUM_HEADS + head) * num_splits + (split - first_split)
            tl.store(split_acc + partial[:, None] * HEAD_DIM + column[None, :], acc, mask=inside)
            tl.store(split_top + partial, top, mask=is_head)
            tl.store(split_total + partial, total, mask=is_head)


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(  # type: ignore[no-untyped-def]
    split_acc,
    split_top,
    split_total,
    out,
    query_start,
    context_len,
    decode,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program (item and head): its splits in ascending order, BLOCK_SPLITS at a time."""
    item = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(0) % NUM_HEADS
    column = tl.arange(0, BLOCK_DIM)
    sequence = tl.load(decode + item)
    context = tl.load(context_len + sequence)
    first = tl.maximum(context - WINDOW, 0) if WINDOW else context * 0
    span = _span(context, WINDOW, SPLIT, MOST_SPLITS)
    count = tl.cdiv(context, span) - first // span
    partial = (item * NUM_HEADS + head) * num_splits
    top = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_DIM), tl.float32)
    for at in range(0, count, BLOCK_SPLITS):
        split = at + tl.arange(0, BLOCK_SPLITS)
        made = split < count
        tops = tl.load(split_top + partial + split, mask=made, other=-float("inf"))
        totals = tl.load(split_total + partial + split, mask=made, other=0.0)
        accs = tl.load(
            split_acc + (partial + split)[:, None] * HEAD_DIM + column[None, :],
            mask=made[:, None] & (column < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weight = tl.exp2(tops - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight * totals, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, None] * accs, 0)[None, :]
        top = new_top
    row = tl.load(query_start + sequence).to(tl.int64) * NUM_HEADS + head
    at_row = row * HEAD_DIM + column[None, :]
    tl.store(out + at_row, _normalized(acc, total, out.dtype.element_ty), mask=(column < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["table_width"])
def prefill_attention_kernel(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    out,
    block_tables,
    query_start,
    context_len,
    prefill,
    log2_scale,
    table_width,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program (tile and part of its rows; KV head). A query has SHARED rows: the heads that share the KV head."""
    SHARED: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PARTS: tl.constexpr = (QUERY_TILE * SHARED + ROWS - 1) // ROWS
    tile = prefill + tl.program_id(0) // PARTS * 3
    first_row = tl.program_id(0) % PARTS * ROWS
    kv_head = tl.program_id(1)
    tile_end = tl.load(tile + 2)
    first_query = tl.load(tile + 1)
    low_query = first_query + first_row // SHARED
    if low_query >= tile_end:
        return
    sequence = tl.load(tile).to(tl.int64)
    shared_row = first_row + tl.arange(0, ROWS)
    query = first_query + shared_row // SHARED
    head = kv_head * SHARED + shared_row % SHARED
    column = tl.arange(0, BLOCK_DIM)
    inside = (query < tile_end)[:, None] & (column < HEAD_DIM)[None, :]
    row = (query.to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + column[None, :]
    queries = tl.load(q + row, mask=inside, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)

    # A query's position; the lowest and the highest one here.
    shift = tl.load(context_len + sequence) - tl.load(query_start + sequence + 1)
    query_position = query + shift
    low = low_query + shift
    high = tl.minimum(first_query + (first_row + ROWS - 1) // SHARED, tile_end - 1) + shift
    first = tl.maximum(low - WINDOW + 1, 0) if WINDOW else low * 0
    begin = first // BLOCK_KEYS * BLOCK_KEYS
    # Without a window, all rows see all of the blocks up to here.
    whole = (low + 1) // BLOCK_KEYS * BLOCK_KEYS

    table = block_tables + sequence * table_width
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        stop = high + 1 if masked else whole
        top, total, acc = _attend(
            queries,
            k_cache,
            v_cache,
            table,
            kv_head,
            query_position,
            begin,
            stop,
            first,
            high + 1,
            top,
            total,
            acc,
            log2_scale,
            NUM_KV_HEADS,
            HEAD_DIM,
            PAGE_SIZE,
            WINDOW,
            BLOCK_KEYS,
            BLOCK_DIM,
            masked == 1,
        )
        begin = stop
    tl.store(out + row, _normalized(acc, total, out.dtype.element_ty), mask=inside)
