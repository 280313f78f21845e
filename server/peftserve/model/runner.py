"""Executes plans: `StepPlan` in, `StepResult` out. The only part of the engine that computes."""

import torch

from peftserve.engine.plan import StepPlan, StepResult
from peftserve.engine.sampler import Sampler
from peftserve.errors import InternalError
from peftserve.model.adapter_memory import DeviceAdapterMemory
from peftserve.model.batch import build_batch
from peftserve.model.decoder import Decoder
from peftserve.model.graphs import make_graphs
from peftserve.model.kv import KvCache
from peftserve.model.spec import ModelSpec
from peftserve.model.weights import ModelWeights
from peftserve_kernels.copy_pages import copy_pages


class Runner:
    """The decoder on its KV cache and its adapters.

    `max_context` bounds positions, virtual tokens included. Steps of up to `max_tokens` new tokens of up to `max_rows`
    sequences are captured and replayed, as far as the device can; with 0 rows none are. `int8_activations` as the
    decoder's.
    """

    def __init__(
        self,
        weights: ModelWeights,
        spec: ModelSpec,
        kv: KvCache,
        adapters: DeviceAdapterMemory,
        *,
        max_context: int,
        max_tokens: int,
        max_rows: int,
        int8_activations: bool = False,
    ) -> None:
        self._kv = kv
        self._adapters = adapters
        self._device = weights.embedding.device
        self._sampler = Sampler()
        self._decoder = Decoder(
            weights,
            spec,
            max_context=max_context,
            caches=kv.layers,
            lora=adapters.lora,
            bottleneck=adapters.bottleneck,
            int8_activations=int8_activations,
        )
        with torch.inference_mode():
            self._graphs = make_graphs(
                self._decoder,
                self._device,
                max_tokens=max_tokens,
                max_rows=max_rows,
                max_context=max_context,
                page_size=kv.page_size,
            )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Copy pages, compute every row's new tokens, and pick a token for the rows that sample.

        Returns when the tokens are on the host. Raises `InternalError` for a plan without rows.
        """
        if not plan.rows:
            raise InternalError(f"step {plan.step} has no rows")
        self._adapters.join()
        for copy in plan.page_copies:
            copy_pages(self._kv.layers, copy.src, copy.dst, copy.num_tokens)
        sampling = [(row.request_id, row.sample) for row in plan.rows if row.sample is not None]
        if self._graphs is not None and self._graphs.holds(plan):
            logits = self._graphs.run(plan)
        else:
            batch = build_batch(plan, self._kv.page_size, self._device)
            stream = self._decoder.forward(batch)
            if not sampling:
                return StepResult(plan.step, {})
            logits = self._decoder.logits(stream, batch.sample_rows)
        tokens = self._sampler.sample_rows(logits, [spec for _, spec in sampling])
        return StepResult(plan.step, {request: token for (request, _), token in zip(sampling, tokens, strict=True)})
