"""Figures of one run, and medians of several."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from polymoe.bench.load import Record, Run
from polymoe.bench.systems import Counters

LATE = 0.01  # seconds; a send that much after its due time is counted as late


class SLO(msgspec.Struct, frozen=True):
    """A request is good when its first token came within `ttft` and the others `itl` apart on average (seconds)."""

    ttft: float
    itl: float


DEFAULT_SLO = SLO(ttft=2.0, itl=0.25)


class Distribution(msgspec.Struct, frozen=True):
    """Of some number of values in seconds; None where there were none."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution":
        """Percentiles interpolate linearly between the sorted values."""
        if not values:
            return cls(None, None, None, None)
        p50, p95, p99 = (float(x) for x in np.percentile(values, (50, 95, 99)))
        return cls(float(np.mean(values)), p50, p95, p99)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one system. Counters are of the run alone, `peak_rss_bytes` of the process since its start.

    A request that was given up counts in `ttft_s` and `turnaround_s` with the time it had waited: a lower bound.
    """

    requests: int
    unfinished: int  # given up at the end of an open-loop run
    late_sends: int
    max_late_s: float
    output_tokens_per_s: float
    requests_per_min: float
    ttft_s: Distribution
    itl_s: Distribution
    turnaround_s: Distribution
    goodput_requests_per_s: float
    good_share: float  # of all requests
    reconfigurations: int
    reconfiguration_s: float
    expert_hits: int
    expert_misses: int
    host_bytes: int
    model_loads: int  # whole models, by `swap`
    model_load_s: float
    peak_rss_bytes: int | None


def inter_token_latencies(record: Record) -> list[float]:
    """Seconds between consecutive tokens."""
    return [b - a for a, b in itertools.pairwise(record.token_times)]


def is_good(record: Record, slo: SLO) -> bool:
    """Whether a finished request met the SLO."""
    if not record.finished:
        return False
    gaps = inter_token_latencies(record)
    return ttft(record) <= slo.ttft and (not gaps or sum(gaps) / len(gaps) <= slo.itl)


def ttft(record: Record) -> float:
    """Seconds from due to the first token."""
    return record.token_times[0] - record.due


def summarise(run: Run, counters: Counters, slo: SLO) -> Summary:
    """The figures of a run; `counters` are what the system counted during it."""
    records, seconds = run.records, run.seconds
    lateness = [max(0.0, (r.due if r.sent is None else r.sent) - r.due) for r in records]
    good = sum(is_good(r, slo) for r in records)
    return Summary(
        requests=len(records),
        unfinished=sum(not r.finished for r in records),
        late_sends=sum(late > LATE for late in lateness),
        max_late_s=max(lateness),
        output_tokens_per_s=sum(t <= seconds for r in records for t in r.token_times) / seconds,
        requests_per_min=60 * sum(r.finished and r.token_times[-1] <= seconds for r in records) / seconds,
        ttft_s=Distribution.of([ttft(r) if r.token_times else run.ended - r.due for r in records]),
        itl_s=Distribution.of([gap for r in records for gap in inter_token_latencies(r)]),
        turnaround_s=Distribution.of([(r.token_times[-1] if r.finished else run.ended) - r.due for r in records]),
        goodput_requests_per_s=good / seconds,
        good_share=good / len(records),
        reconfigurations=counters.reconfigurations,
        reconfiguration_s=counters.reconfiguration_s,
        expert_hits=counters.expert_hits,
        expert_misses=counters.expert_misses,
        host_bytes=counters.host_bytes,
        model_loads=counters.model_loads,
        model_load_s=counters.model_load_s,
        peak_rss_bytes=counters.peak_rss_bytes,
    )


def median_of(summaries: Sequence[Any]) -> Any:
    """The median of every figure of several equal structures (structs, dicts, numbers); None where all are None."""
    first = summaries[0]
    if isinstance(first, msgspec.Struct):
        summaries = [msgspec.structs.asdict(s) for s in summaries]
        first = summaries[0]
    if isinstance(first, dict):
        return {name: median_of([s[name] for s in summaries]) for name in first}
    numbers = [s for s in summaries if s is not None]
    return statistics.median(numbers) if numbers else None


def spread_of(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Medians of several runs, with the least and greatest throughput beside it."""
    speeds = [s.output_tokens_per_s for s in summaries]
    medians: dict[str, Any] = median_of(summaries)
    return {
        **medians,
        "output_tokens_per_s_min": min(speeds),
        "output_tokens_per_s_max": max(speeds),
        "runs": len(speeds),
    }
