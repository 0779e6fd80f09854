"""`polymoe bench throughput --variants 1,4,16,64`: the same load over more and more variants.

Systems are loaded one at a time, since many variants fill a computer: of each round every number of variants once, so
that all meet the same noise. A system starts, warms up, takes the load spread evenly over its variants, then by Zipf's
law (variant n gets 1/n of what the first one gets), and ends.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from polymoe.bench.build import Builder
from polymoe.bench.load import run_closed
from polymoe.bench.metrics import Summary, median_of, spread_of
from polymoe.bench.session import Session, run_progress, started
from polymoe.bench.throughput import ThroughputPlan
from polymoe.bench.workload import Arrival, check_context, random_prompts, saturating_arrivals, zipf_arrivals
from polymoe.console import Console
from polymoe.machine import describe_machine

LOADS = ("even", "zipf")
Key = tuple[int, str]  # number of variants, system


@dataclass(frozen=True)
class Growth:
    """A `ThroughputPlan` for each number of variants; `builders`: number -> of that many variants."""

    plan: ThroughputPlan
    builders: Mapping[int, Builder]


async def run_growth(growth: Growth, console: Console) -> dict[str, Any]:
    """Run it.

    Returns: `{"points": [{"variants", "system", "device_bytes", "start_s", "planning_s", "even": medians, "zipf":
        medians}], "settings": …, "machine": …}`; `planning_s` is None for a bundle that was there.
    Raises: `PolymoeError` for what cannot be run.
    """
    plan = growth.plan
    planning, device_bytes = _plan_bundles(growth, console)
    summaries: dict[Key, dict[str, list[Summary]]] = {key: {load: [] for load in LOADS} for key in planning}
    starts: dict[Key, list[float]] = {key: [] for key in planning}
    with run_progress(console) as progress:
        runs = progress.add_task("runs", total=plan.repeats * len(planning) * len(LOADS))
        requests = progress.add_task("", total=plan.total)
        for repeat in range(plan.repeats):
            for key in planning:
                progress.reset(requests, description=f"{key[0]} variants, {key[1]}, run {repeat + 1}")
                await _one_start(
                    growth, key, repeat, summaries[key], starts[key],
                    lambda: progress.advance(requests), lambda: progress.advance(runs), console,
                )  # fmt: skip
    points = [
        {
            "variants": count,
            "system": name,
            "device_bytes": device_bytes[count, name],
            "start_s": median_of(starts[count, name]),
            "planning_s": planning[count, name],
            **{load: spread_of(several) for load, several in summaries[count, name].items()},
        }
        for count, name in planning
    ]
    return {
        "points": points,
        "settings": {
            "in_flight": plan.in_flight,
            "requests": plan.total,
            "input_tokens": plan.lengths.input_tokens,
            "output_tokens": plan.lengths.output_tokens,
            "repeats": plan.repeats,
            "seed": plan.seed,
            "memory": next(iter(growth.builders.values())).memory,
        },
        "machine": describe_machine(),
    }


def _plan_bundles(growth: Growth, console: Console) -> tuple[dict[Key, float | None], dict[Key, int]]:
    """What planning took in seconds (None: found), and bytes on the device, for each number of variants and system."""
    planning: dict[Key, float | None] = {}
    device_bytes: dict[Key, int] = {}
    for count, builder in growth.builders.items():
        arrivals = saturating_arrivals(builder.variants, growth.plan.total, growth.plan.lengths)
        for name in growth.plan.systems:
            began, now = time.time(), time.monotonic()
            with console.status(f"planning {name} for {count} variants"):
                bundle = builder.shared_bundle(name.partition(":")[2])
            found = bundle.path.stat().st_mtime < began
            planning[count, name] = None if found else time.monotonic() - now
            device_bytes[count, name] = bundle.resident_bytes.total
            check_context(arrivals, min(v.max_model_len for v in bundle.variants))
            builder.check_memory([name])
    return planning, device_bytes


async def _one_start(
    growth: Growth, key: Key, repeat: int, summaries: dict[str, list[Summary]], starts: list[float],
    on_request: Callable[[], None], on_run: Callable[[], None], console: Console,
) -> None:  # fmt: skip
    """Start the system, measure each load once, end it."""
    plan, (count, name) = growth.plan, key
    builder = growth.builders[count]
    system = builder.system(name)
    vocab_size = min(v.vocab_size for v in builder.shared_bundle(name.partition(":")[2]).variants)
    session = Session({name: system}, builder.variants, vocab_size, plan.slo, console)
    now = time.monotonic()
    async with started({name: system}, console):
        starts.append(time.monotonic() - now)
        await session.warm_up(name, plan.in_flight, plan.lengths)
        for load in LOADS:
            arrivals = _arrivals(load, builder.variants, plan, repeat)
            prompts = random_prompts(arrivals, vocab_size, plan.seed + repeat)
            run = partial(run_closed, arrivals=arrivals, prompts=prompts, in_flight=plan.in_flight, on_done=on_request)
            _, summary = await session.measure(name, run)
            summaries[load].append(summary)
            on_run()


def _arrivals(load: str, variants: list[str], plan: ThroughputPlan, repeat: int) -> list[Arrival]:
    if load == "even":
        return saturating_arrivals(variants, plan.total, plan.lengths)
    return zipf_arrivals(variants, plan.total, plan.lengths, plan.seed + repeat)
