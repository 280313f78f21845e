"""How a decode query's positions are cut into splits, and what room their sums take. Needs no Triton.

Splits start at multiples of a span that only the query's own context and the window decide, so that neither other
queries nor the width of the batch's block tables show in a row's bits.
"""

from typing import Final

SPLIT: Final = 256
"""The shortest span: positions whose softmax a program takes at once."""

MOST_SPLITS: Final = 64
"""A context of more than so many spans has longer ones: 64 programs a KV head are more than any chip holds blocks."""


def max_splits(positions: int, window: int) -> int:
    """Splits that one query may see in a context of at most `positions`, `window` 0 for none; at least one."""
    splits = max(-(-positions // SPLIT), 1)
    if not window:
        return min(splits, MOST_SPLITS)
    # As many spans as hold the window, and one more where they do not begin with it.
    return min(splits, min(-(-(window - 1) // SPLIT), MOST_SPLITS) + 1)


def workspace_bytes(queries: int, heads: int, head_dim: int, positions: int, window: int) -> int:
    """What the sums of so many decode queries take, none where a query has one split. float32, and of each split
    [head_dim] weighted values, the largest score and the sum of weights."""
    splits = max_splits(positions, window)
    return 4 * queries * heads * splits * (head_dim + 2) if splits > 1 else 0
