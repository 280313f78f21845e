"""Prometheus metrics of the front end: vLLM's names where they exist, `peftserve_*` for what nobody else has.

`api.engine_metrics` adds what is read from the engine when scraped. Labels by adapter are bounded: the first
`max_adapter_labels` adapters get their own, the rest share `other`, and a deleted adapter's series go.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from peftserve.engine.messages import EngineStats, StepUpdate
from peftserve.types import AdapterKind, AdapterRef

OTHER = "other"
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5)
_BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HTTP_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600)

# EngineStats fields that only grow, and the metric each feeds.
_ENGINE_COUNTERS = {
    "prefix_cache_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": ("vllm:num_preemptions", "Sequences preempted to free KV pages"),
    "adapter_loads": ("peftserve_adapter_loads", "Adapters read from the store"),
    "adapter_load_failures": ("peftserve_adapter_load_failures", "Adapter loads that failed"),
    "adapter_evictions_device": ("peftserve_adapter_device_evictions", "Adapters evicted from the device tier"),
    "adapter_evictions_host": ("peftserve_adapter_host_evictions", "Adapters evicted from the host tier"),
}


class Metrics:
    """All metrics of one server, in a registry of its own. Methods belong to the event loop."""

    def __init__(self, *, model_name: str, version: str, max_adapter_labels: int) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self._max_adapter_labels = max_adapter_labels
        self._adapter_labels: set[str] = set()
        self._last_stats = EngineStats()
        ProcessCollector(registry=self.registry)
        Info("peftserve_build", "Version and base model", registry=self.registry).info(
            {"version": version, "model_name": model_name}
        )
        by_model, by_adapter = ["model_name"], ["kind", "adapter"]
        prompt, generated = "Prompt tokens processed", "Tokens generated"
        ttft, e2e = "Seconds from arrival to first token", "Seconds from arrival to the end"
        inter = "Seconds between tokens of a sequence"
        self.prompt_tokens = self._counter("vllm:prompt_tokens", prompt, by_model)
        self.generation_tokens = self._counter("vllm:generation_tokens", generated, by_model)
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", ttft, by_model, _TTFT_S)
        self.inter_token = self._histogram("vllm:inter_token_latency_seconds", inter, by_model, _INTER_TOKEN_S)
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", e2e, by_model, _E2E_S)
        self.success = self._counter(
            "vllm:request_success", "Sequences ended, by reason", ["model_name", "finished_reason"]
        )
        self.adapter_prompt_tokens = self._counter("peftserve_prompt_tokens", prompt, by_adapter)
        self.adapter_generation_tokens = self._counter("peftserve_generation_tokens", generated, by_adapter)
        self.adapter_ttft = self._histogram("peftserve_time_to_first_token_seconds", ttft, by_adapter, _TTFT_S)
        self.adapter_inter_token = self._histogram(
            "peftserve_inter_token_latency_seconds", inter, by_adapter, _INTER_TOKEN_S
        )
        self.adapter_e2e = self._histogram("peftserve_e2e_request_latency_seconds", e2e, by_adapter, _E2E_S)
        self.adapter_finished = self._counter(
            "peftserve_requests_finished", "Sequences ended, by reason", [*by_adapter, "finished_reason"]
        )
        self.adapter_load = self._histogram(
            "peftserve_adapter_load_seconds", "Seconds to read and pack an adapter", ["kind"], _STEP_S
        )
        self.step = self._histogram("peftserve_step_seconds", "Seconds of an engine step", [], _STEP_S)
        self.batch_tokens = self._histogram("peftserve_batch_tokens", "Tokens of an engine step", [], _BATCH_TOKENS)
        self.http_requests = self._counter("peftserve_http_requests", "HTTP answers", ["method", "route", "status"])
        self.http_seconds = self._histogram(
            "peftserve_http_request_seconds", "Seconds from request to the answer's end", ["method", "route"], _HTTP_S
        )
        self.streams_stalled = self._counter(
            "peftserve_streams_stalled", "Streams aborted because their client did not read", ["door"]
        )
        self.grpc_requests = self._counter("peftserve_grpc_requests", "gRPC calls ended", ["method", "status"])
        self._engine_counters = {
            field: self._counter(name, text, by_model).labels(model_name)
            for field, (name, text) in _ENGINE_COUNTERS.items()
        }
        self._load_seen: dict[str, float] = {}

    def request(self, adapter: AdapterRef | None) -> "RequestMetrics":
        """The series that a request for this adapter counts in."""
        kind = AdapterKind.BASE if adapter is None else adapter.kind
        return RequestMetrics(self, str(kind), self._adapter_label(adapter))

    def has_labels(self, label: str) -> bool:
        """Whether an adapter has series of its own under this label; `other` and the base's empty one always do."""
        return label in self._adapter_labels or label in ("", OTHER)

    def forget_adapter(self, adapter: AdapterRef) -> None:
        """Drop a deleted adapter's series."""
        label = _label(adapter)
        if label not in self._adapter_labels:
            return
        self._adapter_labels.discard(label)
        metrics: tuple[MetricWrapperBase, ...] = (
            self.adapter_prompt_tokens,
            self.adapter_generation_tokens,
            self.adapter_ttft,
            self.adapter_inter_token,
            self.adapter_e2e,
            self.adapter_finished,
        )
        for metric in metrics:
            metric.remove_by_labels({"adapter": label})

    def engine_started(self) -> None:
        """A new engine process counts from zero; these counters go on."""
        self._last_stats = EngineStats()
        self._load_seen.clear()

    def engine_update(self, update: StepUpdate) -> None:
        """Take one step's figures in."""
        for field, counter in self._engine_counters.items():
            grown = getattr(update.stats, field) - getattr(self._last_stats, field)
            if grown > 0:
                counter.inc(grown)
        self._last_stats = update.stats
        if update.num_batch_tokens:
            self.step.observe(update.step_s)
            self.batch_tokens.observe(update.num_batch_tokens)
        for digest in update.gone:
            self._load_seen.pop(digest, None)
        for adapter in update.residency:
            if adapter.load_s is not None and self._load_seen.get(adapter.digest) != adapter.load_s:
                self._load_seen[adapter.digest] = adapter.load_s
                self.adapter_load.labels(adapter.kind).observe(adapter.load_s)

    def http_answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """One HTTP request is over; `status` 0: the client had gone before the answer began."""
        # Any client may invent methods; the series must stay few.
        method = method if method in _METHODS else OTHER
        self.http_requests.labels(method, route, status).inc()
        self.http_seconds.labels(method, route).observe(seconds)

    def grpc_answered(self, method: str, status: str) -> None:
        """One gRPC call is over, with this status name."""
        self.grpc_requests.labels(method, status).inc()

    def stream_stalled(self, door: str) -> None:
        """A stream was aborted because its client did not read; `door`: http or grpc."""
        self.streams_stalled.labels(door).inc()

    def render(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self.registry)

    def _adapter_label(self, adapter: AdapterRef | None) -> str:
        if adapter is None:
            return ""
        label = _label(adapter)
        if label not in self._adapter_labels:
            if len(self._adapter_labels) >= self._max_adapter_labels:
                return OTHER
            self._adapter_labels.add(label)
        return label

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class RequestMetrics:
    """One request's series, looked up once: some of them are touched for every token."""

    def __init__(self, metrics: Metrics, kind: str, adapter: str) -> None:
        model = metrics.model_name
        self._metrics = metrics
        self._labels = (kind, adapter)
        self._ttft = (metrics.ttft.labels(model), metrics.adapter_ttft.labels(kind, adapter))
        self._inter = (metrics.inter_token.labels(model), metrics.adapter_inter_token.labels(kind, adapter))
        self._generated = (
            metrics.generation_tokens.labels(model),
            metrics.adapter_generation_tokens.labels(kind, adapter),
        )

    def tokens(self, seconds: float, *, count: int, first: bool) -> None:
        """`count` tokens of one sequence came, `seconds` after the ones before (after the arrival if `first`)."""
        for histogram in self._ttft if first else self._inter:
            histogram.observe(seconds)
        for counter in self._generated:
            counter.inc(count)

    def finished(self, *, reason: str, prompt_tokens: int, seconds: float) -> None:
        """One sequence ended, `seconds` after its request's arrival. `reason`: a `FinishReason`."""
        metrics = self._metrics
        kind, adapter = self._labels
        if not metrics.has_labels(adapter):  # deleted while this ran: its series must not come back
            adapter = OTHER
        metrics.success.labels(metrics.model_name, reason).inc()
        metrics.adapter_finished.labels(kind, adapter, reason).inc()
        metrics.prompt_tokens.labels(metrics.model_name).inc(prompt_tokens)
        metrics.adapter_prompt_tokens.labels(kind, adapter).inc(prompt_tokens)
        metrics.e2e.labels(metrics.model_name).observe(seconds)
        metrics.adapter_e2e.labels(kind, adapter).observe(seconds)


def _label(adapter: AdapterRef) -> str:
    return adapter.name if adapter.tenant == "default" else f"{adapter.tenant}/{adapter.name}"
