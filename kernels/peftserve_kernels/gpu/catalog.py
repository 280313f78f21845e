"""The launches in use: every op as a server calls it, for real models, recorded on meta tensors.

What is compiled ahead of time and reported is made by the same launchers that serving calls, so it cannot drift apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from peftserve_kernels.bottleneck import BottleneckSite, BottleneckWeights, bottleneck_add
from peftserve_kernels.embedding import embedding
from peftserve_kernels.gpu.launch import Launch, Target, recording
from peftserve_kernels.linear import linear_logits
from peftserve_kernels.lora import LoraSlice, LoraWeights, lora_add
from peftserve_kernels.nf4 import NF4_BLOCK, Nf4Weight
from peftserve_kernels.nf4_linear import nf4_linear, prepare_nf4
from peftserve_kernels.paged_attention import AttentionBatch, paged_attention
from peftserve_kernels.penalties import Penalties, RowPenalties, apply_penalties
from peftserve_kernels.rms_norm import rms_norm
from peftserve_kernels.rope import rope_and_store_kv
from peftserve_kernels.sample import sample
from peftserve_kernels.segments import Segments
from peftserve_kernels.silu_mul import silu_mul


class Model(NamedTuple):
    """The sizes of a decoder."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    has_qk_norm: bool = False
    window: int | None = None
    only_attention: bool = False  # its other ops are like those of others

    @property
    def qkv(self) -> tuple[int, int, int]:
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv


MODELS: Final = (
    Model("smollm2-135m", 576, 1536, 9, 3, 64, 49152, 30),
    Model("llama-3.1-8b", 4096, 14336, 32, 8, 128, 128256, 32),
    Model("qwen3-8b", 4096, 12288, 32, 8, 128, 151936, 36, has_qk_norm=True),
    Model("tiny-odd", 192, 320, 8, 2, 40, 259, 3, has_qk_norm=True),
    Model("tiny-unaligned", 64, 128, 8, 1, 8, 31, 2, window=300),  # rows that no wide load reads
    Model("llama-2-7b", 4096, 11008, 32, 32, 128, 32000, 32, only_attention=True),
    Model("mistral-7b", 4096, 14336, 32, 8, 128, 32000, 32, window=4096, only_attention=True),
    Model("wide-heads", 512, 1024, 4, 2, 256, 1024, 2, window=1000, only_attention=True),
)

ROWS: Final = (1, 8, 16, 32, 64, 256, 512, 2048)
"""Tokens a step. Up to `DECODE_ROWS` of them are a decode of as many requests, more are one request's prefill."""

DECODE_ROWS: Final = 256

# What a batch looks like: adapters in it, their rank and width, positions behind each request, the server's pages.
_ADAPTERS: Final = 32
_RANK: Final = 16
_WIDTH: Final = 64
_CONTEXT: Final = 1024
_PAGE_SIZE: Final = 16
_KV_PAGES: Final = 4096
_SLOTS: Final = 32
_RANK_PAGES: Final = 8
_TARGETS: Final = 8
_LAYER: Final = 2
_SEEN_TOKENS: Final = 500


class Work(NamedTuple):
    """What a call must move and compute at the least: bytes of device memory, each touched once, and FLOP."""

    bytes: int
    flops: int


class Call(NamedTuple):
    """A call of an op for a batch: run it under `recording`. is_matrix: its products belong on tensor cores."""

    op: str
    run: Callable[[], object]
    work: Work
    is_matrix: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """A call for one model and batch, and the launches that it made."""

    op: str
    model: str
    rows: int
    dtype: str
    work: Work
    is_matrix: bool
    launches: tuple[Launch, ...]


def uses(target: Target, models: tuple[Model, ...], rows: tuple[int, ...], dtype: torch.dtype) -> list[Use]:
    """All calls of all ops for these models, batches and dtype, as `target` would launch them.

    Raises RuntimeError for an op that launches nothing: it runs on its reference.
    """
    found = []
    for model in models:
        for count in rows:
            for call in calls(model, count, dtype):
                with recording(target) as launches:
                    call.run()
                if not launches:
                    raise RuntimeError(f"{call.op}: no Triton kernel was launched")
                name = str(dtype).removeprefix("torch.")
                found.append(Use(call.op, model.name, count, name, call.work, call.is_matrix, tuple(launches)))
    return found


def calls(model: Model, rows: int, dtype: torch.dtype) -> Iterator[Call]:
    """One call of each op and size that a step of `rows` tokens makes."""
    batch = _Batch(model, rows, dtype)
    if model.only_attention:
        yield batch.attention()
        return
    yield from batch.linears()
    yield from batch.adapters(dtype)
    if dtype == torch.bfloat16:
        yield from batch.adapters(torch.int8, " int8")
    yield batch.attention()
    yield batch.rope()
    yield from batch.elementwise()
    if rows <= DECODE_ROWS:
        yield from batch.picking()


class _Batch(NamedTuple):
    model: Model
    rows: int
    dtype: torch.dtype

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    @property
    def is_decode(self) -> bool:
        return self.rows <= DECODE_ROWS

    @property
    def layers(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """Linear layers as they are merged: name, inputs, outputs of each part."""
        model = self.model
        return [
            ("qkv", model.hidden, model.qkv),
            ("o", model.qkv[0], (model.hidden,)),
            ("gate_up", model.hidden, (model.intermediate, model.intermediate)),
            ("down", model.intermediate, (model.hidden,)),
        ]

    def linears(self) -> Iterator[Call]:
        size = self.dtype.itemsize
        for name, inputs, parts in self.layers:
            outputs = sum(parts)
            packed = self.empty(outputs, inputs // 2, dtype=torch.uint8)
            absmax = self.empty(outputs, inputs // NF4_BLOCK, dtype=torch.float32)
            run = partial(nf4_linear, self.empty(self.rows, inputs), prepare_nf4(Nf4Weight(packed, absmax)), None)
            moved = packed.nbytes + absmax.nbytes + self.rows * (inputs + outputs) * size
            yield Call(f"nf4_linear {name}", run, Work(moved, 2 * self.rows * inputs * outputs), is_matrix=True)
        if self.is_decode:
            hidden, vocab = self.model.hidden, self.model.vocab
            run = partial(linear_logits, self.empty(self.rows, hidden), self.empty(vocab, hidden))
            moved = vocab * hidden * size + self.rows * (hidden * size + vocab * 4)
            yield Call("linear_logits", run, Work(moved, 2 * self.rows * hidden * vocab), is_matrix=True)

    def adapters(self, weights: torch.dtype, suffix: str = "") -> Iterator[Call]:
        """Of adapters whose `weights` are of this dtype; calls' names end with `suffix`."""
        count = min(_ADAPTERS, self.rows) if self.is_decode else 1
        start = [self.rows * index // count for index in range(count + 1)]
        segments = Segments.build(start, list(range(count)), device="meta")
        size, hidden = self.dtype.itemsize, self.model.hidden
        lora = LoraWeights.empty(
            elements=1 << 26,
            slots=_SLOTS,
            layers=self.model.layers,
            targets=_TARGETS,
            pages=_RANK_PAGES,
            dtype=weights,
            device="meta",
        )
        target = 0
        for name, inputs, parts in self.layers:
            slices: list[LoraSlice] = []
            for width in parts:
                slices.append(LoraSlice(target, inputs, sum(piece.out_features for piece in slices), width))
                target += 1
            outputs = sum(parts)
            y, x = self.empty(self.rows, outputs), self.empty(self.rows, inputs)
            run = partial(lora_add, y, x, segments, lora, _LAYER, tuple(slices))
            factors = _RANK * (len(parts) * inputs + outputs)
            moved = count * factors * weights.itemsize + self.rows * (inputs + 2 * outputs) * size
            work = Work(moved, 2 * self.rows * factors)
            yield Call(f"lora_add {name}{suffix}", run, work, is_matrix=True)
        bottleneck = BottleneckWeights.empty(
            elements=1 << 26,
            slots=_SLOTS,
            layers=self.model.layers,
            pages=_RANK_PAGES,
            dtype=weights,
            device="meta",
        )
        stream = self.empty(self.rows, hidden, dtype=torch.float32)
        run = partial(
            bottleneck_add,
            stream,
            self.empty(self.rows, hidden),
            self.empty(self.rows, hidden, dtype=torch.float32),
            segments,
            bottleneck,
            _LAYER,
            BottleneckSite.FFN,
        )
        factors = 2 * _WIDTH * hidden
        moved = count * factors * weights.itemsize + self.rows * hidden * (size + 12)
        yield Call(f"bottleneck_add{suffix}", run, Work(moved, 2 * self.rows * factors), is_matrix=True)

    def attention(self) -> Call:
        model, rows, size = self.model, self.rows, self.dtype.itemsize
        blocks = 2 * max(_CONTEXT, rows) // _PAGE_SIZE
        if self.is_decode:
            batch = AttentionBatch.for_decode(rows, blocks, device="meta")
            positions = pairs = rows * _CONTEXT
        else:
            batch = AttentionBatch.build([[0] * blocks], [0, rows], [rows], device="meta")
            positions, pairs = rows, rows * (rows + 1) // 2
        cache = self.empty(_KV_PAGES, model.kv_heads, _PAGE_SIZE, model.head_dim)
        q = self.empty(rows, model.heads, model.head_dim)
        run = partial(paged_attention, q, cache, cache, batch, model.head_dim**-0.5, model.window)
        moved = (2 * positions * model.kv_heads + 2 * rows * model.heads) * model.head_dim * size
        name = "decode" if self.is_decode else "prefill"
        work = Work(moved, 4 * pairs * model.heads * model.head_dim)
        return Call(f"paged_attention {name}", run, work, is_matrix=True)

    def rope(self) -> Call:
        model, rows = self.model, self.rows
        cache = self.empty(_KV_PAGES, model.kv_heads, _PAGE_SIZE, model.head_dim)
        norm = self.empty(model.head_dim) if model.has_qk_norm else None
        run = partial(
            rope_and_store_kv,
            self.empty(rows, sum(model.qkv)),
            self.empty(rows, model.head_dim, dtype=torch.float32),
            cache,
            cache,
            self.empty(rows, dtype=torch.int64),
            model.heads,
            model.kv_heads,
            model.head_dim,
            norm,
            norm,
            1e-6,
        )
        moved = rows * (2 * sum(model.qkv) * self.dtype.itemsize + 4 * model.head_dim + 8)
        return Call("rope_and_store_kv", run, Work(moved, 3 * rows * sum(model.qkv[:2])))

    def elementwise(self) -> Iterator[Call]:
        model, rows, size = self.model, self.rows, self.dtype.itemsize
        stream = self.empty(rows, model.hidden, dtype=torch.float32)
        run: Callable[[], object] = partial(rms_norm, stream, self.empty(model.hidden), 1e-5, self.dtype)
        elements = rows * model.hidden
        yield Call("rms_norm", run, Work(elements * (4 + size), 4 * elements))
        run = partial(silu_mul, self.empty(rows, 2 * model.intermediate))
        yield Call("silu_mul", run, Work(3 * rows * model.intermediate * size, 5 * rows * model.intermediate))
        run = partial(embedding, self.empty(rows, dtype=torch.int64), self.empty(model.vocab, model.hidden))
        yield Call("embedding", run, Work(elements * (4 + size), 0))

    def picking(self) -> Iterator[Call]:
        rows, vocab = self.rows, self.model.vocab
        logits = self.empty(rows, vocab, dtype=torch.float32)
        row = self.empty(rows, dtype=torch.float32)
        run = partial(sample, logits, row, row.int(), row, row, row.double())
        # weights are made of every logit twice: for the tallies and for the search
        yield Call("sample", run, Work(logits.nbytes, 2 * 4 * rows * vocab))
        tokens = min(_SEEN_TOKENS, vocab)
        counts = dict.fromkeys(range(tokens), 1)
        one = RowPenalties(repetition=1.1, output_counts=counts, banned=frozenset(range(16)))
        penalties = Penalties.build([one] * rows, device="meta")
        pairs = rows * tokens
        yield Call("apply_penalties", partial(apply_penalties, logits, penalties), Work(pairs * 28, 6 * pairs))
