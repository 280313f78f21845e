"""KV pages: who holds which, and which can answer for a prompt that was seen before. Imports no torch.

A page is free, held (refs > 0), or cached: refs = 0, but its content is still known by its hash, so that it can be
taken up again until somebody needs the room. Cached pages are given up in LRU order.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


def root_hash(tenant: str, digest: str | None) -> bytes:
    """The salt at the head of a chain of page hashes: equal tokens share pages only within a tenant and an adapter."""
    salt = hashlib.blake2b(digest_size=16, person=b"peftserve-kv-1")
    salt.update(f"{len(tenant)}:{tenant}:{digest or ''}".encode())
    return salt.digest()


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full page: its own tokens and, through `parent`, everything before it."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16, key=parent).digest()


class KvPageManager:
    """Counts references to `num_pages` pages of `page_size` tokens each and keeps the prefix cache."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.queries = 0
        self.hits = 0
        self._caching = prefix_caching
        self._refs = [0] * num_pages
        self._free: deque[int] = deque(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # refs = 0 but content known, least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def pages_for(self, num_positions: int) -> int:
        """Pages that hold `num_positions` tokens."""
        return -(-num_positions // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and nothing taken) when there are not so many."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._refs[page] = 1
            pages.append(page)
        return pages

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest known run of `hashes`, a reference taken on each."""
        pages: list[int] = []
        for value in hashes:
            page = self._page_of.get(value)
            if page is None:
                break
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1
            pages.append(page)
        return pages

    def count_lookup(self, queried: int, found: int) -> None:
        """A sequence has started, with so many tokens looked up in the cache and found there."""
        if self._caching:
            self.queries += queried
            self.hits += found

    def publish(self, page: int, value: bytes) -> None:
        """Make a held, fully computed page known by its hash. The first page with a hash keeps it."""
        if self._caching and value not in self._page_of and page not in self._hash_of:
            self._hash_of[page] = value
            self._page_of[value] = page

    def release(self, pages: Iterable[int]) -> None:
        """Give one reference of each page back; later pages of a sequence are given up before earlier ones."""
        for page in reversed(list(pages)):
            if self._refs[page] <= 0:
                raise RuntimeError(f"KV page {page} released more often than taken")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def check(self) -> None:
        """Raise RuntimeError unless every page is in exactly one place. For tests and idle moments."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, refs in enumerate(self._refs) if refs}
        if len(free) != len(self._free) or free & cached or (free | cached) & held:
            raise RuntimeError("a KV page is in two places")
        if len(free) + len(cached) + len(held) != self.num_pages:
            raise RuntimeError("a KV page is lost")
        if {v: k for k, v in self._hash_of.items()} != self._page_of or not cached <= self._hash_of.keys():
            raise RuntimeError("the prefix index is out of step with its pages")

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]
