"""What the engine tells of itself, as Prometheus metrics."""

import itertools
import math
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from polymoe.protocol.info import STEP_TOKENS_BOUNDS, EngineInfo, EngineStats
from polymoe.server.endpoint_picker import endpoint_picker_metrics


class EngineCollector(Collector):
    """The engine's last statistics. The use of the one KV cache is repeated for each variant."""

    info: EngineInfo | None = None
    stats: EngineStats | None = None
    taken_at = 0.0  # seconds since the epoch

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
        yield _cache_config(info)
        steps = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", labels=["model_name"]
        )
        steps.add_metric(["all"], _buckets(stats.step_tokens), sum_value=stats.step_tokens_sum)
        yield steps
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
        yield from endpoint_picker_metrics(info, stats, self.taken_at)
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


def _cache_config(info: EngineInfo) -> Metric:
    """vLLM's way to tell what does not change: as labels of a 1."""
    values = {
        "block_size": info.block_size,
        "num_gpu_blocks": info.num_kv_blocks,
        "cache_dtype": info.dtype,
        "enable_prefix_caching": info.prefix_caching,
    }
    config = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=list(values))
    config.add_metric([str(value) for value in values.values()], 1)
    return config


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """(upper bound, how many are not above it); counts: of each bucket, the last without a bound."""
    bounds = [*map(float, STEP_TOKENS_BOUNDS), float("inf")]
    totals = itertools.accumulate(counts)
    return [("+Inf" if math.isinf(bound) else str(bound), total) for bound, total in zip(bounds, totals, strict=True)]
