"""One decoder for the whole Llama family; what differs between its members are flags of `ModelSpec`.

Pre-norm blocks (Touvron et al. 2023) with grouped-query attention, RoPE and a SwiGLU feed-forward network. The residual
stream is float32; everything between two additions to it has the activations' dtype.
"""

from collections.abc import Sequence

import torch

from peftserve.model.batch import Batch
from peftserve.model.kv import LayerCache
from peftserve.model.rope import rope_table
from peftserve.model.spec import ModelSpec, targets
from peftserve.model.weights import LayerWeights, ModelWeights
from peftserve_kernels.bottleneck import BottleneckSite, BottleneckWeights, bottleneck_add
from peftserve_kernels.embedding import embedding
from peftserve_kernels.linear import linear_logits
from peftserve_kernels.lora import LoraSlice, LoraWeights, lora_add
from peftserve_kernels.nf4 import Nf4Weight
from peftserve_kernels.nf4_linear import nf4_linear
from peftserve_kernels.paged_attention import paged_attention
from peftserve_kernels.residual_add import residual_add
from peftserve_kernels.rms_norm import rms_norm
from peftserve_kernels.rope import rope_and_store_kv
from peftserve_kernels.silu_mul import silu_mul


class Decoder:
    """The layers and the head. Stateless between calls; the KV cache and the adapters' weights are passed by reference.

    `max_context` bounds positions; `lora` and `bottleneck` are the device tables of all adapters. `int8_activations`:
    the NF4 projections round their inputs to int8 (`nf4_linear`).
    """

    def __init__(
        self,
        weights: ModelWeights,
        spec: ModelSpec,
        *,
        max_context: int,
        caches: Sequence[LayerCache],
        lora: LoraWeights,
        bottleneck: BottleneckWeights,
        int8_activations: bool = False,
    ) -> None:
        self._weights = weights
        self._spec = spec
        self._caches = caches
        self._lora = lora
        self._bottleneck = bottleneck
        self._int8_activations = int8_activations
        self._dtype = weights.embedding.dtype
        self._scale = spec.head_dim**-0.5
        self._rope = rope_table(spec, max_context, weights.embedding.device)
        self._windows = attention_windows(spec)
        self._qkv, self._o, self._gate_up, self._down = lora_slices(spec)

    def forward(self, batch: Batch) -> torch.Tensor:
        """All layers over the M tokens of `batch`: the residual stream float32 [M, hidden]. Writes their K and V."""
        return self.transform(embedding(batch.token_ids, self._weights.embedding), batch)

    def transform(self, stream: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The same over inputs that are embedded already, float32 [M, hidden], which may be overwritten."""
        cos_sin = embedding(batch.positions, self._rope)
        for index, layer in enumerate(self._weights.layers):
            attended = self._attention(index, layer, stream, cos_sin, batch)
            stream = self._add(stream, attended, batch, index, BottleneckSite.ATTENTION)
            transformed = self._feed_forward(index, layer, stream, batch)
            stream = self._add(stream, transformed, batch, index, BottleneckSite.FFN)
        return stream

    def step(self, batch: Batch) -> torch.Tensor:
        """All of a step up to the draw: logits float32 [B, vocab] of the B rows that sample."""
        return self.logits(self.forward(batch), batch.sample_rows)

    def logits(self, stream: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Final norm and output head: float32 [B, vocab] of `rows` (int64 [B]) of the stream, None for all of them."""
        if rows is not None:
            stream = embedding(rows, stream)
        x = rms_norm(stream, self._weights.norm, self._spec.rms_norm_eps, self._dtype)
        return linear_logits(x, self._weights.head)

    def _attention(
        self, index: int, layer: LayerWeights, stream: torch.Tensor, cos_sin: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        spec = self._spec
        k_cache, v_cache = self._caches[index]
        x = rms_norm(stream, layer.input_norm, spec.rms_norm_eps, self._dtype)
        qkv = self._linear(x, layer.qkv, layer.qkv_bias, batch, index, self._qkv)
        q = rope_and_store_kv(
            qkv,
            None if index in spec.nope_layers else cos_sin,
            k_cache,
            v_cache,
            batch.slots,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=spec.rms_norm_eps,
        )
        attended = paged_attention(
            q, k_cache, v_cache, batch.attention, scale=self._scale, sliding_window=self._windows[index]
        )
        return self._linear(attended, layer.o, layer.o_bias, batch, index, self._o)

    def _feed_forward(self, index: int, layer: LayerWeights, stream: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = rms_norm(stream, layer.post_norm, self._spec.rms_norm_eps, self._dtype)
        gate_up = self._linear(x, layer.gate_up, layer.gate_up_bias, batch, index, self._gate_up)
        return self._linear(silu_mul(gate_up), layer.down, layer.down_bias, batch, index, self._down)

    def _linear(
        self,
        x: torch.Tensor,
        weight: Nf4Weight,
        bias: torch.Tensor | None,
        batch: Batch,
        layer: int,
        slices: Sequence[LoraSlice],
    ) -> torch.Tensor:
        y = nf4_linear(x, weight, bias, int8_inputs=self._int8_activations)
        if batch.lora is not None:
            lora_add(y, x, batch.lora, self._lora, layer, slices)
        return y

    def _add(
        self, residual: torch.Tensor, hidden: torch.Tensor, batch: Batch, layer: int, site: BottleneckSite
    ) -> torch.Tensor:
        """residual + hidden, and the bottlenecks of this site on top. May overwrite `residual`."""
        if batch.bottleneck is None:
            return residual_add(residual, hidden, in_place=True)
        stream = residual_add(residual, hidden, in_place=False)
        bottleneck_add(stream, hidden, residual, batch.bottleneck, self._bottleneck, layer, site)
        return stream


def attention_windows(spec: ModelSpec) -> tuple[int | None, ...]:
    """The attention window of each layer, None for full attention."""
    sliding = spec.sliding_layers or (True,) * spec.num_layers
    return tuple(spec.sliding_window if slides else None for slides in sliding)


def lora_slices(spec: ModelSpec) -> tuple[tuple[LoraSlice, ...], ...]:
    """Where each LoRA target's output lies in the merged projections: qkv, o, gate_up, down."""
    q, k, v, o, gate, up, down = targets(spec)
    merged = []
    for group in ((q, k, v), (o,), (gate, up), (down,)):
        offset = 0
        slices = []
        for target in group:
            slices.append(LoraSlice(target.index, target.in_features, offset, target.out_features))
            offset += target.out_features
        merged.append(tuple(slices))
    return tuple(merged)
