"""Many devices, simulated: the real scheduler and its policies on a simulated clock, the real router and placement.

    python benchmarks/fleet.py routing                  residency-aware routing against random and least-loaded
    python benchmarks/fleet.py day [--out docs/deploy/day.png]
                                                        500 devices, 10,000 variants, a day of diurnal zipf traffic

`routing`: 4 replicas with 2 slots each, 8 variants, zipf; the router hears of slots once a second, as it does from Ray.

`day`: placement is of all devices; of these a sample is simulated, in windows over the day, as all of a day would be a
billion steps. A step costs what `Machine` says, about a 7B model with 1B active weights on an H100.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.placement import problem  # noqa: E402
from polymoe.deploy.ranking import Ranking  # noqa: E402
from polymoe.place.place import place  # noqa: E402
from polymoe.place.problem import PlacedPool  # noqa: E402
from simulation import Arrival, Machine, Result, Simulation, percentile, zipf  # noqa: E402

REPORT_EVERY = 1.0  # seconds between two reports of a replica's slots
GPU = Machine(fixed=0.012, prefill=0.00005, decode=0.0002)
MODEL_SECONDS = 0.28  # to bring 13 GiB to a device at 50 GB/s


class Replica(Simulation):
    """A `Simulation` that takes its requests one by one."""

    def advance(self, until: float) -> None:
        """Steps that begin before `until`."""
        while self.now < until and self.scheduler.has_work():
            self._step()
        self.now = max(self.now, until)

    def take(self, number: int, arrival: Arrival) -> None:
        self._add(number, arrival)

    def finish(self) -> list[Result]:
        while self.scheduler.has_work():
            self._step()
        return list(self._results.values())

    @property
    def queue(self) -> int:
        return sum(1 for _ in self.scheduler.sequences)

    @property
    def loaded(self) -> list[str]:
        return [str(variant) for variant in self._loaded]


# --- routing

Router = Callable[[list[Replica], Arrival], int]


def random_router(seed: int) -> Router:
    rng = random.Random(seed)
    return lambda replicas, arrival: rng.randrange(len(replicas))  # noqa: ARG005


def least_loaded(seed: int) -> Router:
    """Ray's own rule: of two random replicas the one with the shorter queue."""
    rng = random.Random(seed)
    return lambda replicas, arrival: min(  # noqa: ARG005
        rng.sample(range(len(replicas)), 2), key=lambda index: replicas[index].queue
    )


def residency(_seed: int) -> Router:
    """`polymoe.deploy.router` without Ray."""
    ranking, reported = Ranking(), -math.inf

    def choose(replicas: list[Replica], arrival: Arrival) -> int:
        nonlocal reported
        now = arrival.time
        if now - reported >= REPORT_EVERY:
            reported = now
            for index, replica in enumerate(replicas):
                ranking.report(str(index), replica.num_slots, replica.loaded, now)
        queues = [(str(index), replica.queue) for index, replica in enumerate(replicas)]
        best = ranking.order(queues, str(arrival.variant), "", now)[0]
        ranking.chosen(best, str(arrival.variant), "", now)
        return int(best)

    return choose


def route(router: Router, arrivals: Iterable[Arrival], num_replicas: int, num_variants: int, slots: int,
          load: float) -> dict[str, float]:  # fmt: skip
    """One run of a trace."""
    machine = Machine(load=load)
    replicas = [
        Replica([], weights=[1.0] * num_variants, num_slots=slots, machine=machine) for _ in range(num_replicas)
    ]
    for number, arrival in enumerate(arrivals):
        for replica in replicas:
            replica.advance(arrival.time)
        replicas[router(replicas, arrival)].take(number, arrival)
    results = [result for replica in replicas for result in replica.finish()]
    ttfts = [result.ttft for result in results]
    return {
        "requests": len(results),
        "reconfigurations": sum(replica.report.reconfigurations for replica in replicas),
        "p50_ttft": round(percentile(ttfts, 0.5), 4),
        "p95_ttft": round(percentile(ttfts, 0.95), 4),
        "seconds": round(max(replica.now for replica in replicas), 1),
    }


ROUTERS: dict[str, Callable[[int], Router]] = {
    "random": random_router, "least_loaded": least_loaded, "residency": residency,
}  # fmt: skip


def compare_routers(
    seconds: float = 200.0, rate: float = 12.0, seed: int = 0, load: float = 0.3, names: Iterable[str] = ROUTERS
) -> dict[str, dict[str, float]]:
    """The same trace with each router: 8 variants on 4 replicas with 2 slots each."""
    found = {}
    for name in names:
        make, trace = ROUTERS[name], zipf(rate, seconds, 8, seed)
        found[name] = route(make(seed), trace, num_replicas=4, num_variants=8, slots=2, load=load)
    return found


# --- a day


@dataclass(frozen=True)
class Hour:
    """What the sampled devices did in one window of the day. Seconds; busy: part of the time."""

    hour: float
    p50_ttft: float
    p95_ttft: float
    busy: float
    requests: int


def diurnal(hour: float) -> float:
    """Traffic relative to its mean: quiet at 4, busiest at 16."""
    return 1.0 + 0.5 * math.sin((hour - 10.0) / 24.0 * 2 * math.pi)


def window(pool: PlacedPool, rates: dict[str, float], hour: float, seconds: float, rng: random.Random) -> list[Arrival]:
    """Requests of one device."""
    names = list(pool.shares)
    weights = [rates[name] * pool.shares[name] for name in names]
    rate, now, arrivals = sum(weights) * diurnal(hour), 1.0, []
    while rate > 0 and (now := now + rng.expovariate(rate)) < 1.0 + seconds:
        variant = rng.choices(range(len(names)), weights)[0]
        prompt, output = int(rng.lognormvariate(4.9, 0.7)), int(rng.lognormvariate(3.9, 0.6))
        arrivals.append(Arrival(now, variant, prompt=max(8, min(prompt, 1500)), output=max(4, min(output, 400))))
    return arrivals


def run_window(arrivals: list[Arrival], num_variants: int, slots: int, load: float) -> tuple[list[float], float, float]:
    """(times to first token, seconds that the device was busy, seconds that passed)."""
    machine = Machine(GPU.fixed, GPU.prefill, GPU.decode, load)
    replica = Replica(
        [], weights=[1.0] * num_variants, num_slots=slots, mix=slots, machine=machine, max_num_seqs=64,
        max_num_batched_tokens=2048,
    )  # fmt: skip
    idle, begin = 0.0, 1.0
    for number, arrival in enumerate(arrivals):
        while replica.now < arrival.time and replica.scheduler.has_work():
            replica._step()
        idle += max(0.0, arrival.time - replica.now)
        replica.now = max(replica.now, arrival.time)
        replica.take(number, arrival)
    ttfts = [result.ttft for result in replica.finish()]
    passed = replica.now - begin
    return ttfts, passed - idle, passed


def day(num_devices: int, num_variants: int, sample: int, seconds: float, seed: int) -> dict[str, object]:
    """Three systems on the same traffic; see the module's docstring."""
    given = problem(num_variants, num_devices, 20, seed, utilisation=0.5)
    placed = place(given)
    rng = random.Random(seed)
    pools = rng.sample(list(placed.pools), sample)
    rates = dict(given.rates)
    hours = [2.0 * number for number in range(12)]
    curves: dict[str, list[Hour]] = {"polymoe": [], "swapping": [], "one a GPU": []}
    for hour in hours:
        merged: dict[str, list[tuple[list[float], float, float]]] = {name: [] for name in curves}
        for pool in pools:
            arrivals = window(pool, rates, hour, seconds, rng)
            count = len(pool.shares)
            merged["polymoe"].append(run_window(arrivals, count, count, 0.0))
            merged["swapping"].append(run_window(arrivals, count, 1, MODEL_SECONDS))
            for variant in range(count):  # a device for each, or for each replica
                own = [Arrival(a.time, 0, a.prompt, a.output) for a in arrivals if a.variant == variant]
                merged["one a GPU"].append(run_window(own, 1, 1, 0.0) if own else ([], 0.0, seconds))
        for name, parts in merged.items():
            ttfts = [value for values, _, _ in parts for value in values]
            busy = sum(part[1] for part in parts) / sum(max(part[2], seconds) for part in parts)
            curves[name].append(
                Hour(hour, percentile(ttfts, 0.5), percentile(ttfts, 0.95), busy, len(ttfts))
            )  # fmt: skip
    copies = sum(len(pool.shares) for pool in placed.pools)
    devices = {"polymoe": num_devices, "swapping": num_devices, "one a GPU": copies}
    requests = sum(rates.values()) * 86400
    return {
        "variants": num_variants,
        "devices": devices,
        "sampled_devices": sample,
        "windows": len(hours),
        "window_seconds": seconds,
        "gpu_seconds_per_1000_requests": {n: round(c * 86400 / requests * 1000, 1) for n, c in devices.items()},
        "busy": {name: round(float(np.mean([hour.busy for hour in curve])), 4) for name, curve in curves.items()},
        "p50_ttft": {n: round(float(np.median([hour.p50_ttft for hour in c])), 4) for n, c in curves.items()},
        "p95_ttft_worst_hour": {n: round(max(hour.p95_ttft for hour in c), 4) for n, c in curves.items()},
        "curves": {name: [hour.__dict__ for hour in curve] for name, curve in curves.items()},
    }


def draw(found: dict[str, object], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = found["curves"]
    devices = found["devices"]
    assert isinstance(curves, dict)
    assert isinstance(devices, dict)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained", dpi=150)
    for name, curve in curves.items():
        hours = [hour["hour"] for hour in curve]
        label = f"{name}, {devices[name]:,} GPUs"
        left.plot(hours, [hour["p95_ttft"] for hour in curve], marker="o", markersize=3, label=label)
        right.plot(hours, [100 * hour["busy"] for hour in curve], marker="o", markersize=3, label=label)
    left.set_yscale("log")
    left.set_ylabel("95 % of first tokens within, seconds")
    right.set_ylabel("busy, % of the time")
    right.set_ylim(0, 100)
    for axes in (left, right):
        axes.set_xlabel("hour of the day")
        axes.set_xticks(range(0, 25, 4))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["routing", "day"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--variants", type=int, default=10_000)
    parser.add_argument("--sample", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "routing":
        print(json.dumps(compare_routers(seed=options.seed)))
        return
    found = day(options.devices, options.variants, options.sample, options.seconds, options.seed)
    if options.out is not None:
        draw(found, options.out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
