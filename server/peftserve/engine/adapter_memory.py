"""What the adapter cache asks of the memory that holds adapters: an interface without torch.

`model.adapter_memory` implements it.
"""

from dataclasses import dataclass
from typing import Protocol

from peftserve.types import AdapterKind, AdapterRef


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter parsed, validated and packed in host memory; `weights` is the memory's own business.

    `host_bytes` is what it takes in the host tier. `num_virtual_tokens` is the prefix length, 0 for other kinds. A
    `lent` one has given its weights to the device, and cannot be placed before `AdapterMemory.take_back`.
    """

    ref: AdapterRef
    host_bytes: int
    num_virtual_tokens: int
    weights: object
    lent: bool = False

    @property
    def kind(self) -> AdapterKind:
        return self.ref.kind


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter lies on the device.

    LoRA and bottleneck: `slot` in the tables of its kind, `device_bytes` of the arena. Prefix: `pages`, pinned KV pages
    whose first `num_virtual_tokens` positions hold its K/V; slot and device_bytes are 0.
    """

    slot: int = 0
    device_bytes: int = 0
    pages: tuple[int, ...] = ()


class AdapterMemory(Protocol):
    """Called by the adapter cache. `load` and `copy` run on its loader thread, the others on the step thread."""

    def load(self, ref: AdapterRef) -> HostAdapter:
        """Read, verify and pack the adapter. Blocks. Raises `AdapterLoadError` with the reason, and no name."""

    def fits(self, adapter: HostAdapter, *, taken_bytes: int = 0, taken_slots: int = 0) -> bool:
        """Whether it could be placed (LoRA and bottleneck) where others take so many bytes and, of its kind, slots."""

    def reserve(self, adapter: HostAdapter) -> Placement | None:
        """Take a slot and arena room for a LoRA or bottleneck adapter, copying nothing; None when there is no room."""

    def copy(self, adapter: HostAdapter, placement: Placement) -> None:
        """Fill a reserved placement (or the given KV pages). No step reads it until this has returned; the runner lets
        steps wait for copies that then are still under way on the device."""

    def lend(self, adapter: HostAdapter) -> HostAdapter:
        """What the host keeps of an adapter once it is placed: all of it, or, where the device's memory is the host's,
        only what `take_back` needs."""

    def take_back(self, adapter: HostAdapter, placement: Placement) -> HostAdapter:
        """A lent adapter whole again, its weights read from its placement, which is yet to be released."""

    def release(self, placement: Placement, kind: AdapterKind) -> None:
        """Give a placement's slot and room back. No step uses it any more."""
