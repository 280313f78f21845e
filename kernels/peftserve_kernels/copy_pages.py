"""copy_pages: the beginning of one KV page to another, in all layers."""

from collections.abc import Sequence

from torch import Tensor


def copy_pages(caches: Sequence[tuple[Tensor, Tensor]], src: int, dst: int, num_tokens: int) -> None:
    """Copy the first `num_tokens` positions of page `src` to page `dst`, K and V, in every layer (in place).

    caches: (k_cache, v_cache) a layer, each [num_pages, num_kv_heads, page_size, head_dim]. This is how a request
    gets a page of its own where its prefix adapter's last page is only partly filled: it will write behind the
    prefix.
    Raises ValueError for a page or a length outside the cache. Plain copies: no backend has anything faster.
    """
    for k_cache, v_cache in caches:
        pages, _, page_size, _ = k_cache.shape
        if not (0 <= src < pages and 0 <= dst < pages and 0 <= num_tokens <= page_size):
            raise ValueError(f"page {src} to {dst}, {num_tokens} tokens: outside {pages} pages of {page_size}")
        k_cache[dst, :, :num_tokens] = k_cache[src, :, :num_tokens]
        v_cache[dst, :, :num_tokens] = v_cache[src, :, :num_tokens]
