"""Prometheus metrics, under the names that dashboards for vLLM query; what only polymoe has is under `polymoe:`."""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.server.recent import Recent
from polymoe.server.request_log import RecordedRequest
from polymoe.server.tenants import Tenant

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """Counts what passes the server, and reports the engine's own statistics beside it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self.recent = Recent()
        self._registry.register(self._engine)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens taken in.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.rejected = counter("polymoe:requests_rejected", "Requests refused with 429.")
        self.engine_restarts = Counter(
            "polymoe:engine_restarts", "Engines started after one that had died.", registry=self._registry
        )
        self.success = counter("vllm:request_success", "Sequences that ended, by reason.", "finished_reason")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "Token to token.", _BETWEEN_TOKENS)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self.queue = histogram("vllm:request_queue_time_seconds", "Waiting to be scheduled.", _REQUEST)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Scheduled to first token.", _REQUEST)
        self.decode = histogram("vllm:request_decode_time_seconds", "First to last token.", _REQUEST)

    def set_engine(self, info: EngineInfo) -> None:
        """All series of all variants exist from then on, at zero. Idempotent."""
        self._engine.info = info
        for variant in info.variants:
            for counter in (self.prompt_tokens, self.generation_tokens, self.rejected):
                counter.labels(variant.name)
            for reason in ("stop", "length", "abort"):
                self.success.labels(variant.name, reason)
            for histogram in (
                self.first_token,
                self.between_tokens,
                self.whole,
                self.queue,
                self.prefill,
                self.decode,
            ):
                histogram.labels(variant.name)

    def set_stats(self, stats: EngineStats) -> None:
        self._engine.stats = stats

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


class RequestTimer:
    """Watches one submission; latencies are those that its client sees. tenant: who has begun it, and pays for it."""

    def __init__(
        self, metrics: Metrics, variant: str, arrival: float, num_prompt_tokens: int, num_sequences: int,
        record: RecordedRequest, tenant: Tenant | None = None,
    ) -> None:  # fmt: skip
        self._metrics, self._tenant = metrics, tenant
        self._variant = variant
        self._arrival = arrival  # time.monotonic()
        self._open = num_sequences
        self._last: dict[tuple[int, int], float] = {}  # (prompt, which of its n) -> time of its last token
        self._record = record
        metrics.prompt_tokens.labels(variant).inc(num_prompt_tokens)
        metrics.recent.prompt(variant, num_prompt_tokens)

    def observe(self, chunks: Sequence[CompletionChunk]) -> None:
        now = time.monotonic()
        metrics, variant = self._metrics, self._variant
        self._record.observe(chunks)
        for chunk in chunks:
            key = (chunk.prompt_index, chunk.index)
            if chunk.token_ids:
                metrics.generation_tokens.labels(variant).inc(len(chunk.token_ids))
                if self._tenant is not None:
                    self._tenant.charge(len(chunk.token_ids))
                first = key not in self._last
                latency = now - (self._arrival if first else self._last[key])
                (metrics.first_token if first else metrics.between_tokens).labels(variant).observe(latency)
                metrics.recent.token(variant, len(chunk.token_ids), latency, first)
                self._last[key] = now
            if chunk.finish_reason is not None:
                self._open -= 1
                metrics.success.labels(variant, chunk.finish_reason).inc()
                metrics.whole.labels(variant).observe(now - self._arrival)
            if chunk.timing is not None:
                for histogram, seconds in zip(
                    (metrics.queue, metrics.prefill, metrics.decode), chunk.timing, strict=True
                ):
                    histogram.labels(variant).observe(seconds)

    def close(self, error: str | None = None) -> None:
        """Sequences that did not end by themselves were aborted, or failed with `error`. Idempotent."""
        self._record.close(error)
        if self._open:
            self._metrics.recent.error(self._variant)
        self._metrics.success.labels(self._variant, "abort").inc(self._open)
        self._open = 0
        if self._tenant is not None:
            self._tenant.end()
            self._tenant = None


class _EngineCollector(Collector):
    """The engine's last statistics. The use of the one KV cache is repeated for each variant."""

    info: EngineInfo | None = None
    stats: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        info, stats = self.info, self.stats
        if info is None or stats is None:
            return
        names = stats.names

        def per_variant(
            name: str, text: str, values: Sequence[float], kind: type[GaugeMetricFamily | CounterMetricFamily]
        ) -> Metric:
            family = kind(name, text, labels=["model_name"])
            for variant, value in zip(names, values, strict=True):
                family.add_metric([variant], value)
            return family

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        usage = [stats.kv_usage] * len(names)
        yield per_variant("vllm:num_requests_running", "Sequences in the batch.", stats.running, gauge)
        yield per_variant("vllm:num_requests_waiting", "Sequences waiting.", stats.waiting, gauge)
        yield per_variant("vllm:kv_cache_usage_perc", "Used part of the KV cache.", usage, gauge)
        for name, text, values in (
            ("vllm:num_preemptions", "Sequences put back for want of KV blocks.", stats.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.prefix_cache_hits),
            ("polymoe:tokens_served", "Tokens computed, of prompts and answers.", stats.tokens_served),
            ("polymoe:deadline_misses", "First tokens later than their SLO class says.", stats.deadline_misses),
        ):
            yield per_variant(name, text, values, counter)
        for name, text, value in (
            ("polymoe:reconfigurations", "Non-experts loaded into a slot.", stats.reconfigurations),
            ("polymoe:reconfiguration_seconds", "Time that took.", stats.reconfiguration_seconds),
            ("polymoe:reconfiguration_bytes", "Bytes that moved.", stats.reconfiguration_bytes),
            ("polymoe:expert_hits", "Absent experts found in the cache.", stats.expert_hits),
            ("polymoe:expert_misses", "Absent experts fetched.", stats.expert_misses),
            ("polymoe:expert_host_bytes", "Bytes fetched for them.", stats.expert_host_bytes),
            ("polymoe:expert_fetch_seconds", "Time that took.", stats.expert_fetch_seconds),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield from _fidelity(info)
        paths = GaugeMetricFamily(
            "polymoe:fast_paths", "Layers or modules, by what they run on.",
            labels=["part", "runs_on", "reason", "slow"],
        )  # fmt: skip
        for path in info.fast_paths:
            paths.add_metric([path.part, path.runs_on, path.reason, str(path.slow).lower()], path.count)
        yield paths
        versions = GaugeMetricFamily(
            "polymoe:variant_version", "What each name means now.", labels=["model_name", "version"]
        )
        for variant in info.variants:
            versions.add_metric([variant.name, variant.version], 1)
        yield versions
        in_flight = GaugeMetricFamily(
            "polymoe:version_requests", "Sequences in flight on each version that is held.", labels=["version"]
        )
        for version, count in stats.in_flight.items():
            in_flight.add_metric([version], count)
        yield in_flight
        yield GaugeMetricFamily("polymoe:added_bytes", "On the device, of added variants.", value=stats.added_bytes)
        resident = GaugeMetricFamily(
            "polymoe:resident_bytes", "Bytes on the device; host_pinned: on the host.", labels=["kind"]
        )
        for kind, count in stats.resident_bytes.items():
            resident.add_metric([kind], count)
        yield resident


def _fidelity(info: EngineInfo) -> Iterator[Metric]:
    """How close each variant is to its original, where it was predicted or measured."""
    predicted = GaugeMetricFamily(
        "polymoe:predicted_damage", "KL to the original that the planner expected.", labels=["model_name"]
    )
    for variant in info.variants:
        if variant.predicted_error is not None:
            predicted.add_metric([variant.name], variant.predicted_error)
    yield predicted
    for name, text, figure in (
        ("polymoe:fidelity_kl", "KL(original || served), nats a token, measured when planned.", "kl"),
        ("polymoe:fidelity_top1", "Share of tokens with the original's first choice, likewise.", "top1"),
        ("polymoe:fidelity_perplexity_original", "Perplexity of the original on that text.", "perplexity_original"),
        ("polymoe:fidelity_perplexity_served", "Perplexity as served on that text.", "perplexity_served"),
    ):
        fidelity = GaugeMetricFamily(name, text, labels=["model_name"])
        for variant in info.variants:
            if variant.fidelity is not None:
                fidelity.add_metric([variant.name], getattr(variant.fidelity, figure))
        yield fidelity
