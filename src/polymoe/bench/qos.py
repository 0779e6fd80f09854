"""`polymoe bench qos`: an open loop, where requests arrive whether or not the system keeps up."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from polymoe.bench.build import Builder, build_systems
from polymoe.bench.ceiling import ceiling_of, measure_bandwidth
from polymoe.bench.load import Record, Run, run_closed, run_open
from polymoe.bench.metrics import DEFAULT_SLO, SLO, Distribution, Summary, median_of, spread_of, ttft
from polymoe.bench.session import Session, run_progress, started
from polymoe.bench.workload import (
    Arrival,
    Lengths,
    check_context,
    poisson_arrivals,
    random_prompts,
    read_trace,
    saturating_arrivals,
)
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.machine import describe_machine
from polymoe.model.backends.device_facts import choose_device

# Of the rate at which `single` saturates, over all variants; the default sweep.
FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class QosPlan:
    """What is run. `rates`: requests a second of each variant; None: `FRACTIONS` of what `single` can take. A `trace`
    takes the place of rates and lengths. `flood`: (variant, factor on its rate). Raises `PolymoeError` for values out
    of range."""

    systems: list[str]
    lengths: list[Lengths]
    rates: list[float] | None = None
    duration: float = 30.0
    drain: float = 60.0  # seconds to wait for the last requests of a run
    repeats: int = 3
    in_flight: int = 32  # of the closed loop that finds the saturated rate
    seed: int = 0
    slo: SLO = DEFAULT_SLO
    trace: Path | None = None
    flood: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        for option, count in (("requests", self.in_flight), ("repeats", self.repeats)):
            if count < 1:
                raise PolymoeError(f"--{option} must be at least 1, got {count}.")
        for rate in self.rates or ():
            if not 0 < rate < float("inf"):
                raise PolymoeError(f"--rates {rate:g}: a rate is a positive number of requests a second.")
        for name, value, least in (("duration", self.duration, 1e-9), ("drain", self.drain, 0.0)):
            if not least <= value < float("inf"):
                raise PolymoeError(f"--{name} {value:g} is out of range.")
        if self.flood is not None and not 0 < self.flood[1] < float("inf"):
            raise PolymoeError(f"--flood {self.flood[0]}={self.flood[1]:g}: the factor must be a positive number.")
        if self.flood is not None and self.trace is not None:
            raise PolymoeError("--flood changes Poisson rates; it has no meaning with --trace.")


@dataclass
class Point:
    """One place of the sweep, and what each system did there, a run each repeat."""

    rate: float | None  # None: a trace
    lengths: Lengths | None
    arrivals: list[list[Arrival]]  # one workload a repeat
    flooded: list[list[Arrival]] | None
    duration: float | None
    runs: dict[str, list[Summary]] = field(default_factory=dict)
    others: dict[str, tuple[list[Distribution], list[Distribution]]] = field(default_factory=dict)  # TTFT: calm, flood


async def run_qos(plan: QosPlan, builder: Builder, console: Console) -> dict[str, Any]:
    """Run the plan.

    Returns: `{"rates": [{"rate_per_variant", "lengths", "systems": {name: medians}, "flood"?}, …], "ceiling": …, …}`.
    Raises: `PolymoeError` for what cannot be run.
    """
    bundle = builder.shared_bundle()
    context = min(v.max_model_len for v in bundle.variants)
    if plan.flood is not None and plan.flood[0] not in builder.variants:
        raise PolymoeError(f"--flood: there is no variant {plan.flood[0]!r}, only {', '.join(builder.variants)}.")
    trace = None if plan.trace is None else read_trace(plan.trace, builder.variants)
    for lengths in plan.lengths:
        check_context(trace or saturating_arrivals(builder.variants, 1, lengths), context)
    needs_single = trace is None and plan.rates is None and "single" not in plan.systems
    systems = build_systems(builder, [*plan.systems, *(["single"] if needs_single else [])], console)
    with console.status("measuring the bandwidth of the memory"):
        bandwidth = measure_bandwidth(choose_device(builder.device), builder.threads)
    vocab_size = min(v.vocab_size for v in bundle.variants)
    session = Session(systems, builder.variants, vocab_size, plan.slo, console)
    async with started(systems, console):
        for name in systems:
            with console.status(f"warming up {name}"):
                await session.warm_up(name, plan.in_flight, plan.lengths[0])
        saturated: dict[str, float] = {}
        if trace is not None:
            points = [Point(None, None, [trace] * plan.repeats, None, None)]
        else:
            points = []
            for lengths in plan.lengths:
                rates = plan.rates
                if rates is None:
                    with console.status(f"finding the rate that single sustains at {lengths}"):
                        saturated[str(lengths)] = await _saturated_rate(session, plan, lengths)
                    rates = [f * saturated[str(lengths)] / len(builder.variants) for f in FRACTIONS]
                points += [_point(plan, builder.variants, rate, lengths) for rate in rates]
        with run_progress(console) as progress:
            await _run_points(session, plan, points, progress)
        kv_bytes = await session.kv_bytes_per_token()
    first = plan.lengths[0]
    mean_context = first.input_tokens + first.output_tokens / 2
    bundles = {"mixed": bundle, "single": bundle}
    ceiling = ceiling_of(bundles, bandwidth, plan.in_flight, mean_context, kv_bytes or 0.0, {}, {})
    return {
        "rates": [_point_report(point, plan) for point in points],
        "ceiling": ceiling,
        "settings": {
            "variants": len(builder.variants),
            "duration_s": plan.duration if trace is None else None,
            "drain_s": plan.drain,
            "repeats": plan.repeats,
            "seed": plan.seed,
            "memory": builder.memory,
            "trace": None if plan.trace is None else plan.trace.name,
            "single_saturated_requests_per_s": saturated or None,
            "slo": {"ttft_s": plan.slo.ttft, "itl_s": plan.slo.itl},
        },
        "machine": describe_machine(),
    }


async def _saturated_rate(session: Session, plan: QosPlan, lengths: Lengths) -> float:
    """Requests a second that `single` completes with `in_flight` always there."""
    arrivals = saturating_arrivals(session.variants, 2 * plan.in_flight, lengths)
    prompts = random_prompts(arrivals, session.vocab_size, seed=-2)
    run = await run_closed(session.systems["single"], arrivals, prompts, plan.in_flight, lambda: None)
    return len(arrivals) / run.seconds


def _point(plan: QosPlan, variants: Sequence[str], rate: float, lengths: Lengths) -> Point:
    rates = dict.fromkeys(variants, rate)
    seeds = range(plan.seed, plan.seed + plan.repeats)
    calm = [poisson_arrivals(rates, plan.duration, lengths, seed) for seed in seeds]
    flooded = None
    if plan.flood is not None:
        flooded = [poisson_arrivals(rates, plan.duration, lengths, seed, dict([plan.flood])) for seed in seeds]
    if not all((*calm, *(flooded or ()))):
        raise PolymoeError(
            f"at {rate:g} requests a second no request arrives within {plan.duration:g} s; give a longer --duration."
        )
    return Point(rate, lengths, calm, flooded, plan.duration)


async def _run_points(session: Session, plan: QosPlan, points: list[Point], progress: Progress) -> None:
    """Every repeat visits every point and there every system, so that the machine's noise hits all alike."""
    floods = 1 if plan.flood is None else 2
    runs = progress.add_task("runs", total=plan.repeats * len(points) * len(plan.systems) * floods)
    requests = progress.add_task("")
    seconds = sum(max(a[-1].at, p.duration or 0.0) for p in points for a in (*p.arrivals, *(p.flooded or ())))
    session.console.print(
        f"Requests arrive for {seconds * len(plan.systems) / 60:.1f} minutes in all.", highlight=False
    )

    async def measure(name: str, point: Point, arrivals: list[Arrival], repeat: int, what: str) -> tuple[Run, Summary]:
        at = "trace" if point.rate is None else f"{point.rate:.3g}/s a variant"
        progress.reset(requests, description=f"{name}, {at}{what}, run {repeat + 1}", total=len(arrivals))
        prompts = random_prompts(arrivals, session.vocab_size, plan.seed + repeat)
        result = await session.measure(
            name,
            lambda system: run_open(
                system, arrivals, prompts, point.duration, plan.drain, lambda: progress.advance(requests)
            ),
        )
        progress.advance(runs)
        return result

    for repeat in range(plan.repeats):
        for point in points:
            for name in plan.systems:
                calm, summary = await measure(name, point, point.arrivals[repeat], repeat, "")
                point.runs.setdefault(name, []).append(summary)
                if plan.flood is None or point.flooded is None:
                    continue
                if name == "single":  # it has one variant only, so nobody to be fair to
                    progress.advance(runs)
                    continue
                flood, _ = await measure(name, point, point.flooded[repeat], repeat, ", flood")
                both = point.others.setdefault(name, ([], []))
                for run, kept in zip((calm, flood), both, strict=True):
                    kept.append(_ttft_of_others(run, plan.flood[0]))


def _ttft_of_others(run: Run, flooding: str) -> Distribution:
    """TTFT of the variants that do not flood; a request without a token counts with the time it waited."""

    def waited(record: Record) -> float:
        return ttft(record) if record.token_times else run.ended - record.due

    return Distribution.of([waited(r) for r in run.records if r.variant != flooding])


def _point_report(point: Point, plan: QosPlan) -> dict[str, Any]:
    report: dict[str, Any] = {
        "rate_per_variant": point.rate,
        "lengths": None if point.lengths is None else str(point.lengths),
        "systems": {name: spread_of(several) for name, several in point.runs.items()},
    }
    if plan.flood is not None:
        report["flood"] = {"variant": plan.flood[0], "factor": plan.flood[1], "others_ttft_s": {}}
        for name, (calm, flood) in point.others.items():
            before, after = median_of(calm), median_of(flood)
            ratio = after["p95"] / before["p95"] if before["p95"] and after["p95"] else None
            report["flood"]["others_ttft_s"][name] = {"calm": before, "flooded": after, "p95_ratio": ratio}
    return report
