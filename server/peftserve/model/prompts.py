"""Prompt tuning: virtual tokens that go through the base once, when the adapter is loaded.

Their keys and values are all that real tokens see of them (Lester et al. 2021, arXiv:2104.08691; attention is causal),
so that from then on the adapter is a prefix.
"""

import torch

from peftserve.adapters.formats.parsed import PromptAdapter
from peftserve.engine.plan import Row, StepPlan
from peftserve.model.batch import build_batch
from peftserve.model.decoder import Decoder
from peftserve.model.kv import KvCache
from peftserve.model.packing import PackedPrefix, require_finite
from peftserve.model.spec import ModelSpec
from peftserve.model.weights import ModelWeights
from peftserve.types import AdapterKind
from peftserve_kernels.bottleneck import BottleneckWeights
from peftserve_kernels.lora import LoraWeights

_CHUNK = 256  # virtual tokens at a time, which bounds the memory beside the steps that run meanwhile


class PromptEncoder:
    """Computes prefixes on `weights`, a model of `spec`, as a step of the served model would: beside its steps.

    `lora` and `bottleneck` are the served tables, of which nothing is read.
    """

    def __init__(
        self,
        weights: ModelWeights,
        spec: ModelSpec,
        *,
        lora: LoraWeights,
        bottleneck: BottleneckWeights,
        page_size: int,
        int8_activations: bool = False,
    ) -> None:
        self._weights = weights
        self._spec = spec
        self._lora = lora
        self._bottleneck = bottleneck
        self._page_size = page_size
        self._int8_activations = int8_activations

    @torch.inference_mode()
    def encode(self, adapter: PromptAdapter) -> PackedPrefix:
        """The prefix on the host. Raises `AdapterLoadError` where a key or a value overflows."""
        count, size = adapter.num_virtual_tokens, self._page_size
        device, dtype = self._weights.embedding.device, self._weights.embedding.dtype
        cache = KvCache(self._spec, num_pages=-(-count // size), page_size=size, dtype=dtype, device=device)
        decoder = Decoder(
            self._weights,
            self._spec,
            max_context=count,
            caches=cache.layers,
            lora=self._lora,
            bottleneck=self._bottleneck,
            int8_activations=self._int8_activations,
        )
        embedded = torch.from_numpy(adapter.embeddings.float32()).to(device)
        for start in range(0, count, _CHUNK):
            chunk = embedded[start : start + _CHUNK]
            row = Row(
                request_id="",
                kind=AdapterKind.BASE,
                slot=0,
                token_ids=[0] * len(chunk),
                num_computed=start,
                block_table=range(cache.num_pages),
                sample=None,
            )
            decoder.transform(chunk, build_batch(StepPlan(0, (row,)), size, device))
        for half in (cache.k, cache.v):
            require_finite(half, "a key or value of its virtual tokens")
        return PackedPrefix(cache.k.cpu(), cache.v.cpu(), count)
