"""Prometheus metrics, under the names that dashboards for vLLM query; what only polymoe has is under `polymoe:`."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.server.engine_metrics import EngineCollector
from polymoe.server.recent import Recent
from polymoe.server.tally import TallyHistogram

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_COUNTS = (1, 2, 5, 10, 20, 50)
_REASONS = ("stop", "length", "abort", "error")
_MOST_GROUPS = 8  # variants that have histograms of their own

disable_created_metrics()  # type: ignore[no-untyped-call]  # a line more for each series, which no dashboard asks for


class VariantMetrics:
    """The series of one variant."""

    def __init__(self, metrics: "Metrics", variant: str, group: str) -> None:
        self.prompt_tokens = metrics.prompt_tokens.labels(variant)
        self.generation_tokens = metrics.generation_tokens.labels(variant)
        self.rejected = metrics.rejected.labels(variant)
        self.ended = {reason: metrics.success.labels(variant, reason) for reason in _REASONS}
        self.first_token = metrics.first_token.labels(group)
        self.between_tokens = metrics.between_tokens.labels(group)
        self.whole = metrics.whole.labels(group)
        self.queue = metrics.queue.labels(group)
        self.prefill = metrics.prefill.labels(group)
        self.decode = metrics.decode.labels(group)
        self.inference = metrics.inference.labels(group)
        self.per_output_token = metrics.per_output_token.labels(group)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(group)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(group)
        self.request_max_generation_tokens = metrics.request_max_generation_tokens.labels(group)
        self.params_n = metrics.params_n.labels(group)
        self.params_max_tokens = metrics.params_max_tokens.labels(group)


class Metrics:
    """Counts what passes the server, and reports the engine's own statistics beside it.

    Labels are names of served variants and words of this file, never what a client sent. A histogram is twenty lines:
    where there are more than `_MOST_GROUPS` variants, those of all of them together are shown, as model "all".
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = EngineCollector()
        self.recent = Recent()
        self._registry.register(self._engine)
        self._variants: dict[str, VariantMetrics] = {}

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
        self.between_tokens = TallyHistogram("vllm:inter_token_latency_seconds", "Token to token.", _BETWEEN_TOKENS)
        self._registry.register(self.between_tokens)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self.queue = histogram("vllm:request_queue_time_seconds", "Waiting to be scheduled.", _REQUEST)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Scheduled to first token.", _REQUEST)
        self.decode = histogram("vllm:request_decode_time_seconds", "First to last token.", _REQUEST)
        self.inference = histogram("vllm:request_inference_time_seconds", "Scheduled to last token.", _REQUEST)
        self.per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Token to token, on average.", _BETWEEN_TOKENS
        )
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Of a prompt.", _TOKENS)
        self.request_generation_tokens = histogram("vllm:request_generation_tokens", "Of an answer.", _TOKENS)
        self.request_max_generation_tokens = histogram(
            "vllm:request_max_num_generation_tokens", "Of the longest of a request's n answers.", _TOKENS
        )
        self.params_n = histogram("vllm:request_params_n", "Answers that a request asked for.", _COUNTS)
        self.params_max_tokens = histogram("vllm:request_params_max_tokens", "Tokens that it allowed.", _TOKENS)

    def set_engine(self, info: EngineInfo) -> None:
        """All series of all variants exist from then on, at zero. Idempotent."""
        if self._engine.info is info:
            return
        self._engine.info = info
        for variant in info.variants:
            self.of(variant.name)

    def of(self, variant: str) -> VariantMetrics:
        """Of a variant that the engine has, or had."""
        if variant not in self._variants:  # new, or a version that is held though no name means it
            many = self._engine.info is not None and len(self._engine.info.variants) > _MOST_GROUPS
            self._variants[variant] = VariantMetrics(self, variant, "all" if many else variant)
        return self._variants[variant]

    def set_stats(self, stats: EngineStats) -> None:
        self._engine.stats, self._engine.taken_at = stats, time.time()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
