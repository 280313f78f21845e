"""The inputs of a captured decode step, one token a row: always at the same addresses, refilled before every replay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from peftserve.engine.plan import Row, SegmentPlan, StepPlan
from peftserve.model.batch import Batch
from peftserve_kernels.paged_attention import AttentionBatch
from peftserve_kernels.segments import Segments, tile_tokens

_ALIGNMENT: Final = 64
_KINDS: Final = ("lora", "bottleneck")


@dataclass(frozen=True, slots=True)
class _Field:
    """One table: on the host, and where kernels read it (the same memory on the CPU)."""

    host: npt.NDArray[Any]
    device: torch.Tensor


class DecodeBatch:
    """Tables for up to `max_rows` sequences of up to `max_context` positions.

    Replays of different sizes share them. On a GPU they are one block of pinned memory, copied over in one piece.
    """

    def __init__(self, *, max_rows: int, max_context: int, page_size: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self._page_size = page_size
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "token_ids": ((max_rows,), np.int64),
            "positions": ((max_rows,), np.int64),
            "slots": ((max_rows,), np.int64),
            "block_tables": ((max_rows, -(-max_context // page_size)), np.int32),
            "query_start": ((max_rows + 1,), np.int32),
            "context_len": ((max_rows,), np.int32),
        }
        for adapter_kind in _KINDS:
            shapes[f"{adapter_kind}_start"] = ((max_rows + 1,), np.int32)
            shapes[f"{adapter_kind}_slot"] = ((max_rows,), np.int32)
            shapes[f"{adapter_kind}_tiles"] = ((max_rows, 3), np.int32)
        sizes = {name: math.prod(shape) * np.dtype(kind).itemsize for name, (shape, kind) in shapes.items()}
        total = sum(_aligned(size) for size in sizes.values())
        self._on_host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._on_device = self._on_host if device.type == "cpu" else torch.zeros_like(self._on_host, device=device)
        self._fields: dict[str, _Field] = {}
        offset = 0
        for name, (shape, kind) in shapes.items():
            host = self._on_host[offset : offset + sizes[name]].numpy().view(kind).reshape(shape)
            dtype = torch.from_numpy(host[:0]).dtype
            on_device = self._on_device[offset : offset + sizes[name]].view(dtype).view(shape)
            self._fields[name] = _Field(host, on_device)
            offset += _aligned(sizes[name])
        self._no_tiles = torch.empty((0, 3), dtype=torch.int32, device=device)
        self._host("query_start")[:] = np.arange(max_rows + 1)
        # Whose block table each row holds, and how much of it: tables only grow, so that mostly nothing is written.
        self._tables: list[Sequence[int] | None] = [None] * max_rows
        self._filled = [0] * max_rows
        self._loaded = 0

    def load(self, plan: StepPlan, rows: int) -> None:
        """Fill in a plan of single tokens; what is left of `rows` becomes padding that reads and writes no KV page."""
        count = len(plan.rows)
        token_ids, positions = self._host("token_ids"), self._host("positions")
        token_ids[:count] = np.fromiter((row.token_ids[0] for row in plan.rows), np.int64, count)
        positions[:count] = np.fromiter((row.num_computed for row in plan.rows), np.int64, count)
        tables = self._host("block_tables")
        for index, row in enumerate(plan.rows):
            self._fill_table(tables[index], index, row)
        at = positions[:count]
        pages = tables[np.arange(count), at // self._page_size].astype(np.int64)
        self._host("slots")[:count] = pages * self._page_size + at % self._page_size
        self._host("context_len")[:count] = at + 1
        if count < max(rows, self._loaded):
            token_ids[count:] = positions[count:] = self._host("context_len")[count:] = 0
            self._host("slots")[count:] = -1
        self._loaded = count
        for kind, segments in zip(_KINDS, (plan.lora, plan.bottleneck), strict=True):
            self._fill_segments(kind, segments)
        if self._on_device is not self._on_host:
            self._on_device.copy_(self._on_host, non_blocking=True)

    def view(self, rows: int, *, lora: bool, bottleneck: bool) -> Batch:
        """The first `rows` rows as a batch; segments, some of them empty, of the kinds that are asked for."""
        return Batch(
            token_ids=self._device("token_ids")[:rows],
            positions=self._device("positions")[:rows],
            slots=self._device("slots")[:rows],
            attention=AttentionBatch(
                block_tables=self._device("block_tables")[:rows],
                query_start=self._device("query_start")[: rows + 1],
                context_len=self._device("context_len")[:rows],
                decode=self._device("query_start")[:rows],  # sequence s has query s
                prefill=self._no_tiles,
            ),
            sample_rows=None,
            lora=self._segments("lora", rows) if lora else None,
            bottleneck=self._segments("bottleneck", rows) if bottleneck else None,
        )

    def _fill_table(self, table: npt.NDArray[np.int32], index: int, row: Row) -> None:
        pages = row.block_table
        filled = self._filled[index] if self._tables[index] is pages else 0
        size = min(len(pages), len(table))  # a table may be longer than the context is, but is not used beyond it
        if size > filled:
            table[filled:size] = pages[filled:size]
        self._tables[index], self._filled[index] = pages, size

    def _fill_segments(self, kind: str, plan: SegmentPlan) -> None:
        start, slot, tiles = (self._host(f"{kind}_{name}") for name in ("start", "slot", "tiles"))
        count = len(plan.slot)
        start[: count + 1] = plan.start
        start[count + 1 :] = plan.start[-1]
        slot[:count] = plan.slot
        slot[count:] = 0
        bounds = [(plan.start[i], plan.start[i + 1], plan.slot[i]) for i in range(count)]
        cut = tile_tokens(bounds)
        tiles[: len(cut)] = np.array(cut, np.int32).reshape(-1, 3)
        tiles[len(cut) :] = 0

    def _segments(self, kind: str, rows: int) -> Segments:
        return Segments(
            start=self._device(f"{kind}_start")[: rows + 1],
            slot=self._device(f"{kind}_slot")[:rows],
            bounds=(),
            tiles=self._device(f"{kind}_tiles")[:rows],
        )

    def _host(self, name: str) -> npt.NDArray[Any]:
        return self._fields[name].host

    def _device(self, name: str) -> torch.Tensor:
        return self._fields[name].device


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
