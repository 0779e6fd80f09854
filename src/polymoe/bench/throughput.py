"""`polymoe bench throughput`: a closed loop that keeps every system saturated."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from polymoe.bench.build import Builder, build_systems
from polymoe.bench.ceiling import Prompts, ceiling_of, measure_bandwidth, measure_matmul
from polymoe.bench.load import run_closed
from polymoe.bench.metrics import DEFAULT_SLO, SLO, Summary, spread_of
from polymoe.bench.session import Session, interleaved, ratios_to, run_progress, started
from polymoe.bench.workload import Lengths, check_context, random_prompts, saturating_arrivals
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.machine import describe_machine
from polymoe.model.backends.device_facts import choose_device


@dataclass(frozen=True)
class ThroughputPlan:
    """What is run: `total` requests a run, `in_flight` of them at once.

    Raises `PolymoeError` for values out of range.
    """

    systems: list[str]
    lengths: Lengths
    in_flight: int = 32
    total: int = 32
    repeats: int = 5
    seed: int = 0
    slo: SLO = DEFAULT_SLO

    def __post_init__(self) -> None:
        for option, value in (("requests", self.in_flight), ("total", self.total), ("repeats", self.repeats)):
            if value < 1:
                raise PolymoeError(f"--{option} must be at least 1, got {value}.")


async def run_throughput(plan: ThroughputPlan, builder: Builder, console: Console) -> dict[str, Any]:
    """Run the plan.

    Returns: `{"systems": {name: medians}, "ratios": {name: to `single`}, "ceiling": …, "settings": …, "machine": …}`.
    Raises: `PolymoeError` for what cannot be run.
    """
    bundle = builder.shared_bundle()
    arrivals = saturating_arrivals(builder.variants, plan.total, plan.lengths)
    check_context(arrivals, min(v.max_model_len for v in bundle.variants))
    systems = build_systems(builder, plan.systems, console)
    with console.status("measuring the memory's bandwidth and torch's matmul"):
        device = choose_device(builder.device)
        bandwidth = measure_bandwidth(device, builder.threads)
        matmul = measure_matmul(device, builder.threads)
    vocab_size = min(v.vocab_size for v in bundle.variants)
    session = Session(systems, builder.variants, vocab_size, plan.slo, console)
    summaries: dict[str, list[Summary]] = {name: [] for name in systems}
    async with started(systems, console):
        with run_progress(console) as progress:
            runs = progress.add_task("runs", total=plan.repeats * len(systems))
            requests = progress.add_task("", total=plan.total)
            for name in systems:
                progress.reset(requests, description=f"{name}, warm-up")
                await session.warm_up(name, plan.in_flight, plan.lengths)
            for repeat, name in interleaved(plan.systems, plan.repeats):
                progress.reset(requests, description=f"{name}, run {repeat + 1}")
                prompts = random_prompts(arrivals, vocab_size, plan.seed + repeat)
                load = partial(
                    run_closed, arrivals=arrivals, prompts=prompts, in_flight=plan.in_flight,
                    on_done=lambda: progress.advance(requests),
                )  # fmt: skip
                _, summary = await session.measure(name, load)
                summaries[name].append(summary)
                progress.advance(runs)
        kv_bytes = await session.kv_bytes_per_token()
    results = {name: spread_of(several) for name, several in summaries.items()}
    speeds = {name: float(result["output_tokens_per_s"]) for name, result in results.items()}
    context = plan.lengths.input_tokens + plan.lengths.output_tokens / 2
    rows = min(plan.in_flight, plan.total, builder.max_num_seqs)
    plans = {"mixed": "", "single": ""}
    plans |= {name: name.partition(":")[2] for name in plan.systems if name.startswith(("mixed:", "single:"))}
    return {
        "systems": results,
        "ratios": {f"{name}/single": ratio for name, ratio in ratios_to("single", speeds).items() if name != "single"},
        "ceiling": ceiling_of(
            {name: builder.shared_bundle(policy) for name, policy in plans.items()},
            bandwidth,
            rows,
            context,
            kv_bytes or 0.0,
            speeds,
            {name: result["itl_s"]["p50"] for name, result in results.items()},
            Prompts(rows * plan.lengths.input_tokens, matmul, {n: r["ttft_s"]["p50"] for n, r in results.items()}),
        ),
        "settings": {
            "variants": len(builder.variants),
            "in_flight": plan.in_flight,
            "requests": plan.total,
            "input_tokens": plan.lengths.input_tokens,
            "output_tokens": plan.lengths.output_tokens,
            "repeats": plan.repeats,
            "seed": plan.seed,
            "memory": builder.memory,
            "threads": builder.threads or torch.get_num_threads(),
            "slo": {"ttft_s": plan.slo.ttft, "itl_s": plan.slo.itl},
        },
        "machine": describe_machine(),
    }
