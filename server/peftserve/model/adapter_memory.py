"""Adapters on the device: one arena for LoRA and bottleneck blocks, tables at stable addresses, prefixes as KV pages.

Implements `engine.adapter_memory.AdapterMemory`. The step thread reserves and releases; loader threads load and copy,
beside the steps that run (`uploads`). A slot's tables are cleared (rank 0: nothing to add) from release until the next
copy has put its weights in place.
"""

import heapq
from dataclasses import fields, replace
from pathlib import Path

import torch

from peftserve.adapters import formats
from peftserve.adapters.blobs import read_adapter
from peftserve.adapters.formats.parsed import BottleneckAdapter, LoraAdapter, PrefixAdapter
from peftserve.engine.adapter_memory import HostAdapter, Placement
from peftserve.errors import AdapterLoadError, InternalError, PeftserveError
from peftserve.model.arena import Arena, Extent
from peftserve.model.dora import RowScales
from peftserve.model.kv import KvCache
from peftserve.model.packing import (
    PackedPrefix,
    PackedWeights,
    pack_bottleneck,
    pack_lora,
    pack_prefix,
)
from peftserve.model.prompts import PromptEncoder
from peftserve.model.spec import TARGET_NAMES, ModelSpec
from peftserve.model.uploads import Put, Uploads
from peftserve.model.weights import ModelWeights
from peftserve.types import AdapterKind, AdapterRef
from peftserve_kernels.bottleneck import BottleneckWeights
from peftserve_kernels.lora import LoraWeights
from peftserve_kernels.rank_pages import rank_pages
from peftserve_kernels.zeros import zeros


class _Slots:
    """Table rows of one kind, and the arena extents behind each one in use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._extents: dict[int, tuple[Extent, ...]] = {}

    def any_free(self) -> bool:
        return bool(self._free)

    def take(self, extents: tuple[Extent, ...]) -> int:
        slot = heapq.heappop(self._free)
        self._extents[slot] = extents
        return slot

    def extents(self, slot: int) -> tuple[Extent, ...]:
        return self._extents[slot]

    def give_back(self, slot: int) -> tuple[Extent, ...]:
        if slot not in self._extents:
            raise InternalError(f"adapter slot {slot} is not in use")
        heapq.heappush(self._free, slot)
        return self._extents.pop(slot)


class DeviceAdapterMemory:
    """Adapters on the KV cache's device, for a model of `spec`: LoRA and bottleneck weights in `dtype`, `kv.dtype`
    unless it is given, or int8; prefixes in `kv.dtype`.

    `arena_bytes` bounds LoRA and bottleneck weights together, `num_slots` how many of each kind lie on the device at
    once, `max_rank` a LoRA's rank and a bottleneck's width. `root` is the folder that `adapters.blobs` reads. DoRAs
    and prompts take the weights of the `base`, prompts with `int8_activations` as the decoder's. `lora` and
    `bottleneck` are what the kernels read; their tensors never move.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kv: KvCache,
        *,
        root: Path,
        arena_bytes: int,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype | None = None,
        base: ModelWeights | None = None,
        int8_activations: bool = False,
    ) -> None:
        self._spec = spec
        self._kv = kv
        self._root = root
        self._dtype = dtype or kv.dtype
        self._device = kv.k.device
        self._max_rank = max_rank
        self._arena = Arena(arena_bytes // self._dtype.itemsize)
        self._slots = {AdapterKind.LORA: _Slots(num_slots), AdapterKind.BOTTLENECK: _Slots(num_slots)}
        self._uploads = Uploads(self._device)
        arena = zeros((self._arena.capacity,), self._dtype, self._device, huge_pages=True)
        lora = LoraWeights.empty(
            elements=0,
            slots=num_slots,
            layers=spec.num_layers,
            targets=len(TARGET_NAMES),
            pages=rank_pages(max_rank),
            dtype=self._dtype,
            device=self._device,
        )
        bottleneck = BottleneckWeights.empty(
            elements=0,
            slots=num_slots,
            layers=spec.num_layers,
            pages=rank_pages(max_rank),
            dtype=self._dtype,
            device=self._device,
        )
        self.lora = replace(lora, arena=arena)
        self.bottleneck = replace(bottleneck, arena=arena)
        self._row_scales: RowScales | None = None
        self._prompts: PromptEncoder | None = None
        if base is not None:
            self._row_scales = RowScales(base, spec)
            self._prompts = PromptEncoder(
                base,
                spec,
                lora=self.lora,
                bottleneck=self.bottleneck,
                page_size=kv.page_size,
                int8_activations=int8_activations,
            )

    # -- loader threads ------------------------------------------------------------------------------------------

    def load(self, ref: AdapterRef) -> HostAdapter:
        """Read, verify, parse and pack. Whatever is wrong becomes an `AdapterLoadError`, which names no adapter: the
        same bytes may have several names, of several tenants."""
        try:
            packed = self._load(ref)
        except PeftserveError as error:
            raise AdapterLoadError(error.message, faults=error.faults) from error
        except (OSError, ValueError, MemoryError) as error:
            raise AdapterLoadError(f"{type(error).__name__}: {error}") from error
        tokens = packed.num_tokens if isinstance(packed, PackedPrefix) else 0
        return HostAdapter(ref=ref, host_bytes=packed.nbytes, num_virtual_tokens=tokens, weights=packed)

    @torch.inference_mode()
    def copy(self, adapter: HostAdapter, placement: Placement) -> None:
        """Fill a reserved placement, or the given KV pages with the prefix's K and V; then it takes a `join`."""
        if adapter.lent:
            raise InternalError(f"adapter {adapter.ref.name} has lent its weights to the device")
        packed = _packed(adapter)
        with self._uploads.upload() as put:
            if isinstance(packed, PackedPrefix):
                self._copy_prefix(put, packed, placement.pages)
            else:
                self._copy_weights(put, packed, adapter.kind, placement.slot)

    # -- step thread ---------------------------------------------------------------------------------------------

    def fits(self, adapter: HostAdapter, *, taken_bytes: int = 0, taken_slots: int = 0) -> bool:
        """Whether so much of the arena and so many slots of its kind leave room for a LoRA or bottleneck adapter."""
        room = self._arena.capacity - taken_bytes // self._dtype.itemsize
        return _ends(adapter)[-1] <= room and self._slots[adapter.kind].count > taken_slots

    def reserve(self, adapter: HostAdapter) -> Placement | None:
        """A slot and arena room, all or nothing."""
        slots = self._slots[adapter.kind]
        if not slots.any_free():
            return None
        extents = self._arena.allocate(_ends(adapter))
        if extents is None:
            return None
        size = sum(extent.size for extent in extents)
        return Placement(slot=slots.take(extents), device_bytes=size * self._dtype.itemsize)

    def lend(self, adapter: HostAdapter) -> HostAdapter:
        """On a GPU the adapter as it is; on the CPU without its weights, of which the device's are enough."""
        if self._device.type != "cpu":
            return adapter
        packed = _packed(adapter).without_weights()
        return replace(adapter, weights=packed, host_bytes=packed.nbytes, lent=True)

    @torch.inference_mode()
    def take_back(self, adapter: HostAdapter, placement: Placement) -> HostAdapter:
        """Undo `lend` by reading the arena or the KV pages."""
        packed = _packed(adapter)
        if isinstance(packed, PackedPrefix):
            pages = list(placement.pages)
            whole: PackedWeights | PackedPrefix = replace(packed, k=self._kv.k[:, pages], v=self._kv.v[:, pages])
        else:
            arena = self._table(adapter.kind, "arena")
            extents = self._slots[adapter.kind].extents(placement.slot)
            whole = replace(packed, data=torch.cat([arena[extent.start : extent.end] for extent in extents]))
        return replace(adapter, weights=whole, host_bytes=whole.nbytes, lent=False)

    @torch.inference_mode()
    def release(self, placement: Placement, kind: AdapterKind) -> None:
        """Clear the slot's tables, and give slot and room back."""
        self.join()  # its copies may still be under way
        extents = self._slots[kind].give_back(placement.slot)
        for field in fields(self._weights(kind)):
            if field.name != "arena":
                self._table(kind, field.name)[placement.slot] = _absent(field.name)
        self._arena.free(extents)

    def join(self) -> None:
        """What is computed from now on finds everything that `copy` has returned from."""
        self._uploads.join()

    @property
    def device_bytes_used(self) -> int:
        """Bytes of the arena that are given out."""
        return self._arena.used_size * self._dtype.itemsize

    def check(self) -> None:
        """Raise `InternalError` unless the arena is whole. For tests and idle moments."""
        self._arena.check()

    # ------------------------------------------------------------------------------------------------------------

    def _load(self, ref: AdapterRef) -> PackedWeights | PackedPrefix:
        config, tensors = read_adapter(self._root, ref.digest)
        adapter = formats.parse(config, tensors, self._spec, self._max_rank)
        if adapter.kind is not ref.kind:
            raise AdapterLoadError(f"its files hold a {adapter.kind} adapter, not {ref.kind}")
        if isinstance(adapter, LoraAdapter):
            return pack_lora(
                adapter, self._spec, dtype=self._dtype, max_rank=self._max_rank, row_scales=self._row_scales
            )
        if isinstance(adapter, BottleneckAdapter):
            return pack_bottleneck(adapter, self._spec, dtype=self._dtype, max_rank=self._max_rank)
        if isinstance(adapter, PrefixAdapter):
            return pack_prefix(adapter, dtype=self._kv.dtype, page_size=self._kv.page_size)
        if self._prompts is None:
            raise InternalError("a prompt was to be loaded without the base's weights")
        return self._prompts.encode(adapter)

    def _copy_weights(self, put: Put, packed: PackedWeights, kind: AdapterKind, slot: int) -> None:
        extents = self._slots[kind].extents(slot)
        data = self._table(kind, "arena")
        sources: list[int] = []
        position = 0
        for extent in extents:
            put(data[extent.start : extent.end], packed.data[position : position + extent.size])
            sources.append(position)
            position += extent.size
        # A block's arena offset is its own offset moved as far as the extent that it lies in.
        borders = torch.tensor(sources)
        moves = torch.tensor([extent.start for extent in extents]) - borders
        for name, offsets in packed.offsets.items():
            placed = offsets + moves[torch.searchsorted(borders, offsets.clamp(min=0), right=True) - 1]
            put(self._table(kind, name)[slot], torch.where(offsets < 0, _absent(name), placed))
        for name, values in packed.values.items():
            put(self._table(kind, name)[slot], values)

    def _copy_prefix(self, put: Put, packed: PackedPrefix, pages: tuple[int, ...]) -> None:
        for cache, values in ((self._kv.k, packed.k), (self._kv.v, packed.v)):
            for layer in range(len(values)):
                for page, content in zip(pages, values[layer], strict=True):
                    put(cache[layer, page], content)

    def _weights(self, kind: AdapterKind) -> LoraWeights | BottleneckWeights:
        return self.lora if kind is AdapterKind.LORA else self.bottleneck

    def _table(self, kind: AdapterKind, name: str) -> torch.Tensor:
        table: torch.Tensor = getattr(self._weights(kind), name)
        return table


def _absent(table: str) -> int:
    """What a table holds where there is nothing: only a row scale may be absent where there are weights, as -1."""
    return -1 if table == "row_scale" else 0


def _packed(adapter: HostAdapter) -> PackedWeights | PackedPrefix:
    if not isinstance(adapter.weights, PackedWeights | PackedPrefix):
        raise InternalError(f"adapter {adapter.ref.name} was not loaded by this memory")
    return adapter.weights


def _ends(adapter: HostAdapter) -> tuple[int, ...]:
    if not isinstance(adapter.weights, PackedWeights):
        raise InternalError(f"adapter {adapter.ref.name} has no arena blocks")
    return adapter.weights.ends
