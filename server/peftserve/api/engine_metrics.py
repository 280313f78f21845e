"""Metrics read from the engine's last update when they are scraped, so that a dead engine shows no old figures."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from peftserve.engine.client import EngineState
from peftserve.engine.messages import AdapterResidency, EngineStats


class ObservedEngine(Protocol):
    """What metrics read of `engine.client.EngineClient`."""

    @property
    def state(self) -> EngineState: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def residency(self) -> Mapping[str, AdapterResidency]: ...
    @property
    def restarts(self) -> int: ...


class EngineCollector(Collector):
    """Register it in `Metrics.registry`."""

    def __init__(self, engine: ObservedEngine, *, model_name: str, max_lora: int) -> None:
        self._engine = engine
        self._model_name = model_name
        self._max_lora = max_lora

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        waiting = stats.num_waiting + stats.num_waiting_adapter
        usage = stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the running batch", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences waiting, for a place or for their adapter", waiting),
            ("vllm:kv_cache_usage_perc", "KV pages in use, 1 is all", usage),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        yield self._lora_requests(stats)
        for name, text, value in (
            ("peftserve_requests_waiting_adapter", "Sequences waiting for their adapter", stats.num_waiting_adapter),
            ("peftserve_kv_pages", "KV pages of the cache", stats.kv_pages_total),
            ("peftserve_kv_pages_used", "KV pages in use", stats.kv_pages_used),
            ("peftserve_adapter_device_bytes", "Device memory that adapters take", stats.adapter_device_bytes_used),
            ("peftserve_adapter_host_bytes", "Host memory that adapters take", stats.adapter_host_bytes_used),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield self._tiers()
        state = GaugeMetricFamily("peftserve_engine_state", "1 for the state the engine is in", labels=["state"])
        for candidate in EngineState:
            state.add_metric([candidate], float(candidate is self._engine.state))
        yield state
        yield CounterMetricFamily(
            "peftserve_engine_restarts", "Engine processes started after the first", value=self._engine.restarts
        )

    def _lora_requests(self, stats: EngineStats) -> Metric:
        """vLLM's way of telling gateways where each adapter is warm: one series whose value is the time."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = ",".join(stats.running_adapters), ",".join(stats.waiting_adapters)
        family.add_metric([str(self._max_lora), running, waiting], time.time())
        return family

    def _tiers(self) -> Metric:
        family = GaugeMetricFamily("peftserve_adapters", "Adapters in the cache, by state", labels=["kind", "state"])
        counts = Counter((adapter.kind, adapter.state) for adapter in self._engine.residency.values())
        for (kind, state), count in sorted(counts.items()):
            family.add_metric([kind, state], count)
        return family
