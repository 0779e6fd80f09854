"""Quality of service on a simulated machine: the real scheduler, the traces and the clock of `simulation.py`.

The tables of docs/serving.md are printed with `pytest tests/test_qos_simulation.py -s`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from simulation import (
    Arrival,
    Machine,
    OldestFirst,
    Report,
    Simulation,
    alternating,
    bursts,
    percentile,
    poisson,
    zipf,
)

pytestmark = pytest.mark.slow  # minutes of simulated traffic: `make test-slow`

SECONDS = 120.0
EQUAL = [1.0] * 4


def show(*cells: object) -> None:
    print("|", " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells), "|")


def others(rate: float) -> list[Arrival]:
    """Variants 1 to 3, each with `rate` requests a second."""
    return [a for v in range(1, 4) for a in poisson(rate, SECONDS, seed=v, variant=v)]


def flooding(rate: float) -> Iterator[Arrival]:
    return poisson(rate, SECONDS, seed=9, variant=0)


def run_with(trace: Iterable[Arrival], **options: object) -> Report:
    """While the trace lasts; what is unfinished then counts as infinitely late."""
    return Simulation(trace, **({"weights": EQUAL} | options)).run(until=1 + SECONDS)  # type: ignore[arg-type]


# The machine saturates at about 12.5 requests a second.
@pytest.mark.parametrize("rate", [1.6, 2.0, 2.5, 3.0])
def test_a_flood_does_not_delay_the_others(rate: float) -> None:
    calm = percentile(run_with([*others(rate), *flooding(rate)]).ttfts(lambda a: a.variant > 0), 0.95)
    flood = run_with([*others(rate), *flooding(10 * rate)])
    flooded = percentile(flood.ttfts(lambda a: a.variant > 0), 0.95)
    show("flood", rate, calm, flooded, flooded / calm)
    assert flooded <= 1.3 * calm
    assert flood.served[0] > max(flood.served[1:]), "what the others leave is used"


def test_first_come_first_served_would_delay_them() -> None:
    """What the test above is worth: with everybody in one queue the flood delays all."""
    light = others(2.0)
    one_queue = [replace(a, variant=0) for a in [*light, *flooding(20.0)]]
    times = {a.time for a in light}
    flooded = percentile(run_with(one_queue).ttfts(lambda a: a.time in times), 0.95)
    show("one queue", 2.0, "", flooded, "")
    assert flooded > 10


def test_a_flood_in_bursts_and_with_long_prompts() -> None:
    calm = percentile(run_with([*others(2.0), *flooding(2.0)]).ttfts(lambda a: a.variant > 0), 0.95)
    storm = [replace(a, variant=0, prompt=1500) for a in bursts(4.0, SECONDS, 20, 1, seed=4)]
    flooded = percentile(run_with([*others(2.0), *storm]).ttfts(lambda a: a.variant > 0), 0.95)
    show("long prompts in bursts", 2.0, calm, flooded, flooded / calm)
    assert flooded <= 1.5 * calm


def test_weights_divide_the_tokens_of_variants_that_all_want_more() -> None:
    trace = [a for v in range(3) for a in poisson(15, SECONDS, seed=v, variant=v)]
    served = run_with(trace, weights=[1.0, 2.0, 1.0]).served
    parts = [tokens / sum(served) for tokens in served]
    show("weights 1 : 2 : 1", *parts)
    assert parts == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_sharing_costs_nothing_when_there_is_nobody_to_share_with() -> None:
    """Work-conserving: four variants that are all busy, or one alone, compute as much."""
    mixed = [replace(a, variant=i % 4) for i, a in enumerate(flooding(20.0))]
    ratio = sum(run_with(mixed).served) / sum(run_with(flooding(20.0)).served)
    assert ratio == pytest.approx(1, abs=0.03)


def test_tenants_of_a_variant_do_not_delay_each_other() -> None:
    light = [replace(a, variant=0, tenant="light") for a in others(0.5)]
    flood = [replace(a, tenant="flood") for a in flooding(30.0)]

    def is_light(arrival: Arrival) -> bool:
        return arrival.tenant == "light"

    alone = percentile(run_with(light, weights=[1.0]).ttfts(is_light), 0.95)
    beside = percentile(run_with([*light, *flood], weights=[1.0]).ttfts(is_light), 0.95)
    show("tenants", alone, beside)
    assert beside < 5 * alone < 1.0  # the one queue of a variant would make it a minute


def test_priority_orders_the_requests_of_a_tenant() -> None:
    trace = [replace(a, priority=(-1, 1)[i % 2]) for i, a in enumerate(flooding(16.0))]
    report = Simulation(trace, weights=[1.0]).run()
    early, late = (percentile(report.ttfts(lambda a, p=p: a.priority == p), 0.5) for p in (-1, 1))  # type: ignore[misc]
    assert early < 0.5 < 3 < late


def test_variants_follow_zipf() -> None:
    report = Simulation(zipf(5.0, SECONDS, 4, seed=2), weights=EQUAL).run()
    for variant in range(4):
        assert percentile(report.ttfts(lambda a, v=variant: a.variant == v), 0.95) < 0.6  # type: ignore[misc]


# --- inter-token latency


def test_long_prompts_do_not_make_others_stutter() -> None:
    chats = list(poisson(2.0, SECONDS, seed=1, variant=0, output=64))
    documents = list(poisson(0.15, SECONDS, seed=2, variant=0, prompt=3000, output=8))

    def longest_gap(report: Report) -> float:
        return percentile((r.longest_gap for r in report.results if r.arrival.prompt < 3000), 0.9)

    free = Simulation([*chats, *documents], weights=[1.0], max_num_batched_tokens=2048).run()
    kept = Simulation([*chats, *documents], weights=[1.0], max_num_batched_tokens=2048, target_itl=0.1).run()
    waits = [max(r.ttfts(lambda a: a.prompt == 3000)) for r in (free, kept)]
    show("target ITL 0.1 s", longest_gap(free), longest_gap(kept), *waits)
    assert longest_gap(free) > 0.5
    assert longest_gap(kept) < 0.11
    assert waits[1] < 10, "long prompts go on all the same"


def test_a_target_that_cannot_be_met_stops_nobody() -> None:
    report = Simulation(poisson(2.0, 20, seed=1, variant=0), weights=[1.0], target_itl=0.001).run()
    assert max(report.ttfts()) < 20


# --- deadlines


def test_deadlines_come_before_what_can_wait() -> None:
    """More than the machine can do, in one queue: the third with a deadline keeps it, the rest waits."""

    def trace(target: float | None) -> list[Arrival]:
        return [replace(a, ttft_target=target if i % 3 == 0 else None) for i, a in enumerate(flooding(16.0))]

    sims = [Simulation(trace(target), weights=[1.0]) for target in (None, 1.0)]
    reports = [sim.run() for sim in sims]
    late = [sum(r.ttft > 1.0 for r in report.results[::3]) / len(report.results[::3]) for report in reports]
    show("late without and with a class", *late)
    assert late[0] > 0.5
    assert late[1] < 0.02
    assert sims[1].scheduler.deadline_misses == [sum(r.ttft > 1.0 for r in reports[1].results[::3])]
    assert max(reports[1].ttfts()) < 60, "but not for ever"


def test_a_deadline_is_no_way_around_the_shares() -> None:
    """A flood in which every request claims to be urgent delays the others no more than any flood."""
    calm = percentile(run_with([*others(2.0), *flooding(2.0)]).ttfts(lambda a: a.variant > 0), 0.95)
    urgent = [replace(a, ttft_target=0.3) for a in flooding(20.0)]
    flooded = percentile(run_with([*others(2.0), *urgent]).ttfts(lambda a: a.variant > 0), 0.95)
    show("urgent flood", 2.0, calm, flooded, flooded / calm)
    assert flooded <= 1.4 * calm


def test_admission_refuses_what_would_be_late() -> None:
    """Twice what the machine can do: with admission, what is taken keeps its deadline (predictions are right within a
    quarter), and as much gets done."""
    trace = [replace(a, ttft_target=2.0) for a in flooding(25.0)]
    free = run_with(trace, weights=[1.0])
    kept = run_with(trace, weights=[1.0], admission_factor=1.0)
    late = [sum(r.ttft > 2.5 for r in report.results) / len(report.results) for report in (free, kept)]
    waits = [seconds for _, seconds in kept.refused]
    show("late of those taken, refused", *late, len(kept.refused) / len(trace))
    assert late[0] > 0.9
    assert late[1] < 0.05
    assert sum(kept.served) > 0.95 * sum(free.served)
    assert all(1 <= seconds < 120 for seconds in waits)
    assert not free.refused


def test_a_slow_first_step_does_not_shut_the_door() -> None:
    """An engine that has only seen a hiccup must not refuse everybody: when it is idle it takes a request."""
    sim = Simulation([], weights=[1.0], admission_factor=1.0)
    for _ in range(20):
        sim.scheduler.policies.cost.observe(10, 0, 30.0)
    sim.arrivals = [Arrival(2.0 + 5 * i, 0, ttft_target=0.5) for i in range(40)]
    report = sim.run()
    assert not report.refused
    assert max(report.ttfts()) < 0.2


# --- fewer slots than variants

_TRACES = {
    "bursts of 2 variants": (lambda: bursts(6, SECONDS, 4, 2, seed=1), 2, 1),
    "alternating": (lambda: alternating(0.6, SECONDS), 2, 1),
    "zipf of 4, 2 slots": (lambda: zipf(3, SECONDS, 4, seed=3), 4, 2),
    "zipf of 4, 1 slot": (lambda: zipf(2, SECONDS, 4, seed=3), 4, 1),
    "flood and a few": (
        lambda: [*poisson(8, SECONDS, seed=1, variant=0), *poisson(0.3, SECONDS, seed=2, variant=1)],
        2,
        1,
    ),
}


@pytest.mark.parametrize("load", [0.2, 1.0])
@pytest.mark.parametrize("name", list(_TRACES))
def test_reconfigurations_are_worth_it(name: str, load: float) -> None:
    make, variants, slots = _TRACES[name]
    machine = Machine(load=load)
    reports = []
    for policy in (OldestFirst, None):
        options = {} if policy is None else {"slot_policy": policy}
        sim = Simulation(make(), weights=[1.0] * variants, num_slots=slots, machine=machine, **options)  # type: ignore[arg-type]
        reports.append(sim.run())
    old, new = reports
    for report in reports:
        assert len(report.results) == len(list(make()))
    p95 = [percentile(report.ttfts(), 0.95) for report in reports]
    show(name, load, old.reconfigurations, new.reconfigurations, old.longest_wait, new.longest_wait, *p95)
    # Loads that do not fill a slot without work: one for `stay` times its cost.
    assert new.longest_wait <= 20 * load + (variants - slots) * (11 * load + new.longest_step)
    if name == "bursts of 2 variants":
        assert new.reconfigurations < old.reconfigurations
    if load == 1.0:
        assert new.reconfigurations < old.reconfigurations
        assert p95[1] < 1.3 * p95[0]


def test_cheap_loads_are_used_for_short_waits() -> None:
    """With one slot and loads that cost less than a step, a new request hardly waits for its variant."""
    trace = list(zipf(1.3, SECONDS, 4, seed=3, exponent=0.0))
    single = Simulation([replace(a, variant=0) for a in trace], weights=[1.0]).run()
    options = {"weights": EQUAL, "num_slots": 1, "machine": Machine(load=0.008)}
    old = Simulation(trace, slot_policy=OldestFirst, **options).run()  # type: ignore[arg-type]
    new = Simulation(trace, **options).run()  # type: ignore[arg-type]
    medians = [percentile(report.ttfts(), 0.5) for report in (single, old, new)]
    show("median TTFT: one variant, oldest first, ours", *medians)
    assert medians[2] < 1.6 * medians[0]
    assert medians[1] > 5 * medians[0]


def test_a_deadline_brings_its_variant_in() -> None:
    flood = list(poisson(8, SECONDS, seed=1, variant=0))
    few = list(poisson(0.1, SECONDS, seed=2, variant=1))

    def slowest(target: float | None) -> float:
        trace = [*flood, *(replace(a, ttft_target=target) for a in few)]
        sim = Simulation(trace, weights=[1.0, 1.0], num_slots=1, machine=Machine(load=0.5))
        return percentile(sim.run().ttfts(lambda a: a.variant == 1), 0.5)

    times = slowest(None), slowest(0.8)
    show("median TTFT without and with a deadline", *times)
    assert times[1] < times[0]


def test_one_variant_a_step_takes_turns_without_loads() -> None:
    trace = list(zipf(2.0, SECONDS, 4, seed=5))
    report = Simulation(trace, weights=EQUAL, mix=1).run()
    assert report.reconfigurations == 0
    assert len(report.results) == len(trace)
    assert report.longest_wait <= 3 * report.longest_step + 0.2
