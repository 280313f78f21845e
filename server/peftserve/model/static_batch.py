"""The inputs of captured steps: always at the same addresses, refilled before every replay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from peftserve.engine.plan import Row, SegmentPlan, StepPlan
from peftserve.model.batch import Batch
from peftserve_kernels.paged_attention import AttentionBatch
from peftserve_kernels.segments import TILE_TOKENS, Segments, tile_tokens

_ALIGNMENT: Final = 64
_KINDS: Final = ("lora", "bottleneck")


@dataclass(frozen=True, slots=True)
class _Field:
    """One table: on the host, and where kernels read it (the same memory on the CPU)."""

    host: npt.NDArray[Any]
    device: torch.Tensor


class StaticBatch:
    """Tables for up to `max_tokens` new tokens of up to `max_rows` sequences of up to `max_context` positions.

    Replays of different sizes share them. On a GPU they are one block of pinned memory, copied over in one piece.
    """

    def __init__(
        self, *, max_tokens: int, max_rows: int, max_context: int, page_size: int, device: torch.device
    ) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self._page_size = page_size
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "token_ids": ((max_tokens,), np.int64),
            "positions": ((max_tokens,), np.int64),
            "slots": ((max_tokens,), np.int64),
            "block_tables": ((max_rows, -(-max_context // page_size)), np.int32),
            "query_start": ((max_rows + 1,), np.int32),
            "context_len": ((max_rows,), np.int32),
            "sample_rows": ((max_rows,), np.int64),
        }
        max_tiles = min(max_tokens, max_tokens // TILE_TOKENS + max_rows)
        for adapter_kind in _KINDS:
            shapes[f"{adapter_kind}_start"] = ((max_rows + 1,), np.int32)
            shapes[f"{adapter_kind}_slot"] = ((max_rows,), np.int32)
            shapes[f"{adapter_kind}_tiles"] = ((max_tiles, 3), np.int32)
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
        # Whose block table each row holds, and how much of it: tables only grow, so that mostly nothing is written.
        self._tables: list[Sequence[int] | None] = [None] * max_rows
        self._filled = [0] * max_rows
        self._segment_plans: dict[str, SegmentPlan] = {}  # that are filled in

    def holds(self, plan: StepPlan) -> bool:
        """Whether there is room for the plan."""
        return len(plan.rows) <= self.max_rows and plan.num_tokens <= self.max_tokens

    def load(self, plan: StepPlan, rows: int = 0) -> int:
        """Fill in a plan that it `holds`; returns how many of its rows sample.

        Up to `rows` rows more are made padding of one token each, which reads and writes no KV page.
        """
        count = len(plan.rows)
        lengths = np.fromiter((row.num_tokens for row in plan.rows), np.int64, count)
        computed = np.fromiter((row.num_computed for row in plan.rows), np.int64, count)
        start = self._host("query_start")
        np.cumsum(lengths, out=start[1 : count + 1])
        num_tokens = int(start[count])
        token_ids, positions, slots = (self._host(name) for name in ("token_ids", "positions", "slots"))
        token_ids[:num_tokens] = np.fromiter(
            chain.from_iterable(row.token_ids for row in plan.rows), np.int64, num_tokens
        )
        tables = self._host("block_tables")
        for index, row in enumerate(plan.rows):
            self._fill_table(tables[index], index, row)
        row_of, at = np.arange(count), computed
        if num_tokens > count:
            row_of = np.repeat(row_of, lengths)
            at = np.arange(num_tokens) + (computed - start[:count])[row_of]
        positions[:num_tokens] = at
        slots[:num_tokens] = tables[row_of, at // self._page_size].astype(np.int64) * self._page_size
        slots[:num_tokens] += at % self._page_size
        self._host("context_len")[:count] = computed + lengths
        sampling = np.fromiter((row.sample is not None for row in plan.rows), np.bool_, count)
        sample_rows = start[1 : count + 1][sampling] - 1
        self._host("sample_rows")[: len(sample_rows)] = sample_rows
        if rows > count:
            end = num_tokens + rows - count
            start[count + 1 : rows + 1] = np.arange(num_tokens + 1, end + 1)
            token_ids[num_tokens:end] = positions[num_tokens:end] = self._host("context_len")[count:rows] = 0
            slots[num_tokens:end] = -1
        for kind, segments in zip(_KINDS, (plan.lora, plan.bottleneck), strict=True):
            self._fill_segments(kind, segments)
        if self._on_device is not self._on_host:
            self._on_device.copy_(self._on_host, non_blocking=True)
        return len(sample_rows)

    def view(self, *, lora: bool, bottleneck: bool) -> Batch:
        """All rows and tokens as a batch; segments, some of them empty, of the kinds that are asked for."""
        return self._view(
            self.max_tokens,
            self.max_rows,
            decode=None,
            prefill=None,
            sample_rows=self._device("sample_rows"),
            lora=lora,
            bottleneck=bottleneck,
        )

    def decode_view(self, rows: int, *, lora: bool, bottleneck: bool) -> Batch:
        """The first `rows` rows as a batch of one token each, all of which sample; segments as `view`'s."""
        return self._view(
            rows,
            rows,
            decode=self._device("query_start")[:rows],  # sequence s has query s
            prefill=self._no_tiles,
            sample_rows=None,
            lora=lora,
            bottleneck=bottleneck,
        )

    def _view(
        self,
        tokens: int,
        rows: int,
        *,
        decode: torch.Tensor | None,
        prefill: torch.Tensor | None,
        sample_rows: torch.Tensor | None,
        lora: bool,
        bottleneck: bool,
    ) -> Batch:
        return Batch(
            token_ids=self._device("token_ids")[:tokens],
            positions=self._device("positions")[:tokens],
            slots=self._device("slots")[:tokens],
            attention=AttentionBatch(
                block_tables=self._device("block_tables")[:rows],
                query_start=self._device("query_start")[: rows + 1],
                context_len=self._device("context_len")[:rows],
                decode=decode,
                prefill=prefill,
            ),
            sample_rows=sample_rows,
            lora=self._segments("lora", tokens, rows) if lora else None,
            bottleneck=self._segments("bottleneck", tokens, rows) if bottleneck else None,
        )

    def _fill_table(self, table: npt.NDArray[np.int32], index: int, row: Row) -> None:
        pages = row.block_table
        filled = self._filled[index] if self._tables[index] is pages else 0
        size = min(len(pages), len(table))  # a table may be longer than the context is, but is not used beyond it
        if size > filled:
            table[filled:size] = pages[filled:size]
        self._tables[index], self._filled[index] = pages, size

    def _fill_segments(self, kind: str, plan: SegmentPlan) -> None:
        if plan == self._segment_plans.get(kind):
            return
        self._segment_plans[kind] = plan
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

    def _segments(self, kind: str, tokens: int, rows: int) -> Segments:
        return Segments(
            start=self._device(f"{kind}_start")[: rows + 1],
            slot=self._device(f"{kind}_slot")[:rows],
            bounds=(),
            tiles=self._device(f"{kind}_tiles")[: min(tokens, tokens // TILE_TOKENS + rows)],
        )

    def _host(self, name: str) -> npt.NDArray[Any]:
        return self._fields[name].host

    def _device(self, name: str) -> torch.Tensor:
        return self._fields[name].device


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
