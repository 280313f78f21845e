"""What adapters may hold of the device: one by itself no more than there is, pinned ones together a share of it. (A pin
is never evicted, so without a bound one tenant's pins would leave no place for anybody else's adapters.)"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from peftserve.adapters.faults import refusal
from peftserve.adapters.formats.parsed import device_bytes
from peftserve.adapters.manifest import AdapterRecord
from peftserve.config import EngineConfig
from peftserve.errors import ConflictError
from peftserve.types import AdapterKind


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceQuota:
    """Pins may hold `weight_bytes` for LoRA and bottleneck adapters together, `prefix_pages` of the KV cache, and
    `slots` of each kind.

    All of this is `share`, a setting, of what the engine has: `device_bytes` and `kv_pages`. `adapter_dtype` is
    the type of weights on the device, `page_size` the tokens of a KV page.
    """

    share: float
    device_bytes: int
    kv_pages: int
    weight_bytes: int
    prefix_pages: int
    slots: int
    adapter_dtype: str
    page_size: int

    @classmethod
    def of(cls, config: EngineConfig, *, adapter_device_bytes: int, kv_pages: int, adapter_dtype: str) -> "DeviceQuota":
        """The quota that `max_pinned_share` of what the engine has comes to; `config` may leave the sizes open."""
        share = config.max_pinned_share
        return cls(
            share=share,
            device_bytes=adapter_device_bytes,
            kv_pages=kv_pages,
            weight_bytes=math.floor(share * adapter_device_bytes),
            prefix_pages=math.floor(share * kv_pages),
            slots=math.floor(share * config.max_device_adapters),
            adapter_dtype=adapter_dtype,
            page_size=config.page_size,
        )

    def check_one(self, kind: AdapterKind, details: Mapping[str, Any]) -> None:
        """Raise `InvalidAdapterError` for an adapter (`details` as in its record) that the device could never hold."""
        if kind is AdapterKind.PREFIX:
            # One page more, so that a request has at least a page of its own.
            pages = self._pages(details) + 1
            if pages > self.kv_pages:
                raise refusal(f"its prefix needs {pages} KV pages, and kv_cache_bytes holds {self.kv_pages}")
            return
        needed = device_bytes(details, self.adapter_dtype)
        if needed is not None and needed > self.device_bytes:
            raise refusal(
                f"its weights take {needed} bytes of the device, and adapter_device_bytes is {self.device_bytes}"
            )

    def check(self, pinned: Collection[AdapterRecord]) -> None:
        """Raise `ConflictError`, naming what is exceeded, unless all of `pinned` may be pinned together."""
        # Bytes that have several names lie on the device once.
        records = list({record.digest: record for record in pinned}.values())
        prefixes = [record for record in records if record.kind is AdapterKind.PREFIX]
        weights = [record for record in records if record.kind is not AdapterKind.PREFIX]
        pages = sum(self._pages(record.details) for record in prefixes)
        counts = Counter(record.kind for record in weights)
        for what, needed, limit, setting in (
            ("bytes of adapter memory", sum(map(self._bytes, weights)), self.weight_bytes, "adapter_device_bytes"),
            ("pages of the KV cache", pages, self.prefix_pages, "kv_cache_bytes"),
            *((f"{kind} slots", count, self.slots, "max_device_adapters") for kind, count in sorted(counts.items())),
        ):
            if needed > limit:
                raise ConflictError(
                    f"pinned: all pinned adapters together would hold {needed} {what}, and the limit is {limit} "
                    f"(max_pinned_share {self.share:g} of {setting}); unpin another one first",
                    field="pinned",
                )

    def _pages(self, details: Mapping[str, Any]) -> int:
        return -(-int(details["num_virtual_tokens"]) // self.page_size)

    def _bytes(self, record: AdapterRecord) -> int:
        needed = device_bytes(record.details, self.adapter_dtype)
        # Versions published before there was a count: as many bytes as the file, which is near enough.
        return record.size_bytes if needed is None else needed
