"""All other ops at a model's sizes: each against its reference, the output head against a dense bf16 product too.

Operands that a model has once a layer rotate through as many layers as it takes to leave the cache.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from machine import dense_dtype
from measure import Call, rotating
from nf4_cases import Case, copies_for
from peftserve.model.decoder import lora_slices
from peftserve.model.spec import ModelSpec
from peftserve_kernels import (
    RANK_PAGE_ROWS,
    Activation,
    AttentionBatch,
    BottleneckInput,
    BottleneckSite,
    BottleneckWeights,
    LoraSlice,
    LoraWeights,
    Segments,
    bottleneck_add,
    embedding,
    linear_logits,
    lora_add,
    paged_attention,
    rank_pages,
    read_rank_rows,
    rms_norm,
    rope_and_store_kv,
    sample,
    silu_mul,
)
from peftserve_kernels.bottleneck import bottleneck_add_reference
from peftserve_kernels.embedding import embedding_reference
from peftserve_kernels.linear import linear_logits_reference
from peftserve_kernels.lora import lora_add_reference
from peftserve_kernels.paged_attention import paged_attention_reference
from peftserve_kernels.rms_norm import rms_norm_reference
from peftserve_kernels.rope import rope_and_store_kv_reference
from peftserve_kernels.sample import sample_reference
from peftserve_kernels.silu_mul import silu_mul_reference

RANKS = (4, 8, 16, 64)
WIDTH = 32
PAGE_SIZE = 16
_MAX_SAMPLED_ROWS = 64
_PROJECTIONS = ("qkv", "o", "gate_up", "down")
_BF16 = torch.bfloat16


class OpCases:
    """The ops of a model of `spec` at M tokens, on torch's default device. Decode contexts are of `contexts` tokens."""

    def __init__(self, spec: ModelSpec, contexts: Sequence[int], *, quick: bool) -> None:
        self._spec = spec
        self._contexts = contexts
        self._quick = quick
        self._device = torch.get_default_device()
        self._lora_weights = _lora_weights(spec, self._device, quick=quick)
        self._bottleneck_weights = _bottleneck_weights(spec, self._device, quick=quick)

    def at(self, tokens: int) -> Iterator[Case]:
        """One case after another; each is made when it is its turn, and its memory can go after it."""
        spec = self._spec
        for name, slices in zip(_PROJECTIONS, lora_slices(spec), strict=True):
            yield self._lora(tokens, name, slices)
        yield self._bottleneck(tokens)
        if tokens <= _MAX_SAMPLED_ROWS:
            for context in self._contexts:
                yield self._attention(f"decode, context {context}", [1] * tokens, context)
            yield self._logits(tokens)
            yield self._sample(tokens, "greedy", temperature=0.0, top_p=1.0)
            yield self._sample(tokens, "top_p 0.9", temperature=1.0, top_p=0.9)
        else:
            yield self._attention(f"prefill, context {tokens}", [tokens], tokens)
        yield self._rope(tokens)
        yield self._rms_norm(tokens)
        gate_up = _activations(tokens, 2 * spec.intermediate_size)
        yield self._case(
            "silu_mul",
            str(spec.intermediate_size),
            tokens,
            lambda: silu_mul(gate_up),
            lambda: silu_mul_reference(gate_up),
            nbytes=gate_up.nbytes * 3 // 2,
        )
        yield self._embedding(tokens)

    def _case(
        self,
        op: str,
        shape: str,
        tokens: int,
        ours: Call,
        reference: Call,
        *,
        nbytes: int,
        flops: int = 0,
        dense: Call | None = None,
    ) -> Case:
        variants = {"ours": ours, "reference": reference} | ({"dense": dense} if dense else {})
        return Case(op, shape, tokens, variants, nbytes, flops)

    def _lora(self, tokens: int, name: str, slices: Sequence[LoraSlice]) -> Case:
        weights = self._lora_weights
        segments = Segments.build(*_even_segments(tokens, len(RANKS)), self._device)
        ranks = [RANKS[slot] for _, _, slot in segments.bounds]
        x = _activations(tokens, slices[0].in_features)
        y = _activations(tokens, max(piece.out_offset + piece.out_features for piece in slices))
        features = sum(piece.in_features + piece.out_features for piece in slices)
        layers = range(weights.rank.shape[1])
        case = self._case(
            "lora_add",
            f"{name}, ranks {'/'.join(map(str, ranks))}",
            tokens,
            rotating(layers, lambda layer: lora_add(y, x, segments, weights, layer, slices)),
            rotating(layers, lambda layer: lora_add_reference(y, x, segments, weights, layer, slices)),
            nbytes=2 * sum(ranks) * features + x.nbytes + 2 * y.nbytes,
            flops=sum(2 * (end - start) * RANKS[slot] * features for start, end, slot in segments.bounds),
        )
        case.variants["peft_loop"] = _peft_loop(y, x, segments, weights, slices)
        return case

    def _bottleneck(self, tokens: int) -> Case:
        size = self._spec.hidden_size
        weights = self._bottleneck_weights
        segments = Segments.build((0, tokens), (0,), self._device)
        stream, residual, hidden = torch.randn(tokens, size), torch.randn(tokens, size), _activations(tokens, size)
        data = (stream, hidden, residual, segments, weights)
        site = BottleneckSite.FFN
        layers = range(weights.width.shape[1])
        return self._case(
            "bottleneck_add",
            f"width {WIDTH}",
            tokens,
            rotating(layers, lambda layer: bottleneck_add(*data, layer, site)),
            rotating(layers, lambda layer: bottleneck_add_reference(*data, layer, site)),
            nbytes=2 * 2 * WIDTH * size + hidden.nbytes + 2 * stream.nbytes,
            flops=2 * 2 * tokens * WIDTH * size,
        )

    def _attention(self, shape: str, queries: Sequence[int], context: int) -> Case:
        spec = self._spec
        pages = -(-context // PAGE_SIZE)
        tables = [list(range(at * pages, (at + 1) * pages)) for at in range(len(queries))]
        starts = [sum(queries[:at]) for at in range(len(queries) + 1)]
        batch = AttentionBatch.build(tables, starts, [context] * len(queries), self._device)
        size = (len(queries) * pages, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)
        layer = torch.randn(2, *size).to(_BF16)
        caches = [layer.clone() for _ in range(copies_for(layer.nbytes, quick=self._quick))]
        q = _activations(starts[-1], spec.q_size).view(-1, spec.num_heads, spec.head_dim)
        scale = spec.head_dim**-0.5
        seen = sum(n * context - n * (n - 1) // 2 for n in queries)
        return self._case(
            "paged_attention",
            shape,
            starts[-1],
            rotating(caches, lambda kv: paged_attention(q, kv[0], kv[1], batch, scale)),
            rotating(caches, lambda kv: paged_attention_reference(q, kv[0], kv[1], batch, scale)),
            nbytes=2 * 2 * len(queries) * context * spec.kv_size + 2 * q.nbytes,
            flops=2 * 2 * seen * spec.q_size,
        )

    def _logits(self, tokens: int) -> Case:
        rows, columns = self._spec.vocab_size, self._spec.hidden_size
        weight = (torch.randn(rows, columns) * columns**-0.5).to(_BF16)
        weights = [weight.clone() for _ in range(copies_for(weight.nbytes, quick=self._quick))]
        x = _activations(tokens, columns)
        # A copy each only where the dtype differs.
        dense = [each.to(dense_dtype()).t() for each in weights]
        rival_x = x.to(dense_dtype())
        return self._case(
            "linear_logits",
            f"{rows}x{columns}",
            tokens,
            rotating(weights, lambda w: linear_logits(x, w)),
            rotating(weights, lambda w: linear_logits_reference(x, w)),
            nbytes=weight.nbytes + x.nbytes + 4 * tokens * rows,
            flops=2 * tokens * rows * columns,
            dense=rotating(dense, lambda w: torch.mm(rival_x, w)),
        )

    def _sample(self, tokens: int, shape: str, *, temperature: float, top_p: float) -> Case:
        logits = torch.randn(tokens, self._spec.vocab_size) * 3
        row = torch.ones(tokens)
        values = (logits, row * temperature, row.int() * 0, row * top_p, row * 0, torch.rand(tokens))
        ours, reference = (lambda: sample(*values)), (lambda: sample_reference(*values))
        return self._case("sample", shape, tokens, ours, reference, nbytes=logits.nbytes)

    def _rope(self, tokens: int) -> Case:
        spec = self._spec
        qkv = _activations(tokens, spec.q_size + 2 * spec.kv_size)
        angle = torch.rand(tokens, spec.head_dim // 2)
        cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
        pages = -(-tokens // PAGE_SIZE)
        k_cache = torch.zeros(pages, spec.num_kv_heads, PAGE_SIZE, spec.head_dim, dtype=_BF16)
        v_cache = torch.zeros_like(k_cache)
        slots = torch.arange(tokens)
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        return self._case(
            "rope_and_store_kv",
            f"{spec.num_heads} + 2 x {spec.num_kv_heads} heads",
            tokens,
            lambda: rope_and_store_kv(qkv, cos_sin, k_cache, v_cache, slots, *heads),
            lambda: rope_and_store_kv_reference(qkv, cos_sin, k_cache, v_cache, slots, *heads),
            nbytes=2 * qkv.nbytes + cos_sin.nbytes,
        )

    def _rms_norm(self, tokens: int) -> Case:
        size, eps = self._spec.hidden_size, self._spec.rms_norm_eps
        x, weight = torch.randn(tokens, size), torch.rand(size)
        return self._case(
            "rms_norm",
            str(size),
            tokens,
            lambda: rms_norm(x, weight, eps, _BF16),
            lambda: rms_norm_reference(x, weight, eps, _BF16),
            nbytes=x.nbytes * 3 // 2 + weight.nbytes,
        )

    def _embedding(self, tokens: int) -> Case:
        table = torch.randn(self._spec.vocab_size, self._spec.hidden_size).to(_BF16)
        ids = torch.randint(0, self._spec.vocab_size, (tokens,))
        return self._case(
            "embedding",
            str(self._spec.hidden_size),
            tokens,
            lambda: embedding(ids, table),
            lambda: embedding_reference(ids, table),
            nbytes=6 * tokens * self._spec.hidden_size,
        )


def _peft_loop(y: Tensor, x: Tensor, segments: Segments, weights: LoraWeights, slices: Sequence[LoraSlice]) -> Call:
    """What PEFT does for a mixed batch: two products and a sum for each adapter and module, in the model's dtype."""
    work = []
    for start, end, slot in segments.bounds:
        for piece in slices:
            at = (slot, 0, piece.target)
            a, b = (
                read_rank_rows(weights.arena, pages[at].tolist(), RANKS[slot], width)
                for pages, width in ((weights.a_page, piece.in_features), (weights.b_page, piece.out_features))
            )
            out = y[start:end, piece.out_offset : piece.out_offset + piece.out_features]
            work.append((out, x[start:end], a.t().contiguous(), b.contiguous(), float(weights.scale[at])))

    def loop() -> None:
        for out, inputs, a, b, scale in work:
            out += inputs @ a @ b * scale

    return loop


def _activations(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).to(_BF16)


def _even_segments(tokens: int, adapters: int) -> tuple[list[int], list[int]]:
    """Tokens shared out evenly among the adapters with the highest ranks; fewer adapters than tokens."""
    used = min(tokens, adapters)
    return [tokens * at // used for at in range(used + 1)], list(range(adapters - used, adapters))


def _lora_weights(spec: ModelSpec, device: torch.device, *, quick: bool) -> LoraWeights:
    """A slot for each of `RANKS`, on every target, in as many layers as leave the cache."""
    sizes = [(piece.target, piece.in_features, piece.out_features) for group in lora_slices(spec) for piece in group]
    rows = [RANK_PAGE_ROWS * rank_pages(rank) for rank in RANKS]
    per_layer = sum(rows) * sum(inputs + outputs for _, inputs, outputs in sizes)
    layers = copies_for(2 * per_layer, quick=quick)
    weights = LoraWeights.empty(
        elements=layers * per_layer,
        slots=len(RANKS),
        layers=layers,
        targets=len(sizes),
        pages=rank_pages(max(RANKS)),
        dtype=_BF16,
        device=device,
    )
    weights.arena.normal_(std=0.02)
    weights.scale.fill_(2.0)
    weights.rank[:] = torch.tensor(RANKS, dtype=torch.int32).view(-1, 1, 1)
    at = 0
    for layer in range(layers):
        for slot, rank in enumerate(RANKS):
            for target, inputs, outputs in sizes:
                for table, features in ((weights.a_page, inputs), (weights.b_page, outputs)):
                    at = _place_pages(table[slot, layer, target], at, rank, features)
    return weights


def _bottleneck_weights(spec: ModelSpec, device: torch.device, *, quick: bool) -> BottleneckWeights:
    """One slot of `WIDTH` after the FFN, in as many layers as leave the cache."""
    size, pages = spec.hidden_size, rank_pages(WIDTH)
    per_layer = 2 * pages * RANK_PAGE_ROWS * size + WIDTH + size
    layers = copies_for(2 * per_layer, quick=quick)
    weights = BottleneckWeights.empty(
        elements=layers * per_layer, slots=1, layers=layers, pages=pages, dtype=_BF16, device=device
    )
    weights.arena.normal_(std=0.02)
    weights.scale.fill_(1.0)
    weights.width[:, :, BottleneckSite.FFN] = WIDTH
    weights.activation.fill_(Activation.SILU)
    weights.input_mode.fill_(BottleneckInput.HIDDEN)
    for layer in range(layers):
        at = layer * per_layer
        index = (0, layer, int(BottleneckSite.FFN))
        at = _place_pages(weights.down_page[index], at, WIDTH, size)
        at = _place_pages(weights.up_page[index], at, WIDTH, size)
        weights.down_bias[index] = at
        weights.up_bias[index] = at + WIDTH
    return weights


def _place_pages(table: Tensor, at: int, rank: int, features: int) -> int:
    """Write the offsets of consecutive pages from `at` on; returns where they end."""
    count, stride = rank_pages(rank), RANK_PAGE_ROWS * features
    table[:count] = at + stride * torch.arange(count)
    return at + stride * count
