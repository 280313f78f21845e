"""The chain of hashes that names a request's full KV pages in the prefix cache. Imports no torch."""

from peftserve.engine.kv_cache import page_hash, root_hash
from peftserve.engine.request import Request


def extend(request: Request, num_pages: int, *, page_size: int, num_shared: int) -> None:
    """Make `request.page_hashes` cover its first `num_pages` own pages, whose tokens must all be known.

    Own pages follow the `num_shared` full pages of the adapter's prefix. The first one may begin with virtual tokens:
    they need no hash of their own, as the adapter's digest is in the root.
    """
    hashes = request.page_hashes
    while len(hashes) < num_pages:
        start = (num_shared + len(hashes)) * page_size - request.num_virtual_tokens
        tokens = request.token_ids[max(start, 0) : start + page_size]
        parent = hashes[-1] if hashes else root_hash(request.spec.tenant, request.digest)
        hashes.append(page_hash(parent, tokens))
