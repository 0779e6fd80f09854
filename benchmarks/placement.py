"""Placement at scale: 10,000 variants on 500 devices against first-fit, and what moves when a variant is added.

    python benchmarks/placement.py [--variants 10000] [--devices 500] [--families 20] [--seed 0]

Families are trees: a base, lines of descent from it (relative distance to it: log-normal, median 0.15), and variants of
each line (median 0.05). Directions of independent updates are orthogonal, so that squared distances add. Rates are zipf
over all variants. Sizes are those of OLMoE-1B-7B in bfloat16 on devices of 141 GiB.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np

from polymoe.place.cost import delta_bits
from polymoe.place.first_fit import first_fit
from polymoe.place.place import place, shelves_of
from polymoe.place.problem import Device, Family, Placement, Problem

GIB = 1 << 30


def family_tree(name: str, num_variants: int, rng: np.random.Generator, per_line: int = 20) -> Family:
    """Distances of a family that descends from one base, in random order."""
    line = rng.integers(max(1, num_variants // per_line), size=num_variants)
    line_square = rng.lognormal(np.log(0.15), 0.6, size=line.max() + 1) ** 2
    own_square = rng.lognormal(np.log(0.05), 0.6, size=num_variants) ** 2
    apart = line[:, None] != line[None]
    of_line = line_square[line]
    square = own_square[:, None] + own_square[None] + apart * (of_line[:, None] + of_line[None])
    np.fill_diagonal(square, 0.0)
    names = tuple(f"{name}-{number}" for number in range(num_variants))
    return Family(name, names, np.sqrt(square).astype(np.float32), expert_bytes=12 * GIB, nonexpert_bytes=GIB)


def problem(num_variants: int, num_devices: int, num_families: int, seed: int, utilisation: float = 0.6) -> Problem:
    """Families of unequal sizes, zipf rates, equal devices."""
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(num_variants - num_families, rng.dirichlet(np.full(num_families, 5.0))) + 1
    families = tuple(family_tree(f"f{number}", int(size), rng) for number, size in enumerate(sizes))
    names = [name for family in families for name in family.variants]
    rates = 1.0 / np.arange(1, len(names) + 1)
    rates *= utilisation * num_devices * 20.0 / rates.sum()
    rng.shuffle(rates)
    devices = tuple(Device(f"gpu-{number}", 141 * GIB, 20.0) for number in range(num_devices))
    return Problem(families, devices, dict(zip(names, rates.tolist(), strict=True)))


def compare(given: Problem, seed: int = 0) -> dict[str, float]:
    """Bytes of `place` and of first-fit on the same devices with the same limit of load, and what one more moves."""
    started = time.perf_counter()
    placed = place(given)
    seconds = time.perf_counter() - started
    check(given, placed)
    rng = np.random.default_rng(seed)
    device = {device.name: device for device in given.devices}
    baseline = []
    for family in given.families:
        mine = [device[pool.device] for pool in placed.pools if pool.family == family.name]
        shelves = shelves_of(given, family, mine)
        rate = {pool.device: pool.rate for pool in placed.pools}
        shelves.limit = max(shelves.limit, max(rate[d.name] / d.rate for d in mine))
        first_fit(shelves, rng.permutation(len(family.variants)))
        baseline += shelves.pools()
    first = Placement(tuple(baseline))
    check(given, first)

    family = given.families[0]
    grown = _with_another(family, rng)
    new = grown.variants[-1]
    more = replace(given, families=(grown, *given.families[1:]), rates={**given.rates, new: 1.0})
    started = time.perf_counter()
    after = place(more, placed)
    again = time.perf_counter() - started
    check(more, after)
    num_variants = len(given.rates)
    return {
        "variants": num_variants,
        "devices": len(given.devices),
        "seconds": round(seconds, 2),
        "bytes_tib": round(placed.num_bytes / 2**40, 3),
        "first_fit_bytes_tib": round(first.num_bytes / 2**40, 3),
        "saved": round(1 - placed.num_bytes / first.num_bytes, 4),
        "less_error_at_equal_bytes": round(1 - _error_at(given, placed, first.num_bytes) / given.error, 4),
        "busiest": round(max(busy(given, placed)), 4),
        "first_fit_busiest": round(max(busy(given, first)), 4),
        "pools": len(placed.pools),
        "first_fit_pools": len(first.pools),
        "copies": sum(len(pool.shares) for pool in placed.pools),
        "first_fit_copies": sum(len(pool.shares) for pool in first.pools),
        "add_one_seconds": round(again, 2),
        "add_one_moved": len(after.moved(placed)) / num_variants,
    }


def check(given: Problem, placed: Placement) -> None:
    """Everybody is served whole, and no device holds or serves more than it can."""
    device = {device.name: device for device in given.devices}
    shares = dict.fromkeys(given.rates, 0.0)
    for pool in placed.pools:
        assert pool.num_bytes <= device[pool.device].memory, pool.device
        assert pool.rate <= device[pool.device].rate * (1 + 1e-6), pool.device
        for name, share in pool.shares.items():
            shares[name] += share
    assert all(abs(share - 1) < 1e-3 for share in shares.values()), "shares do not sum to 1"


def busy(given: Problem, placed: Placement) -> list[float]:
    """Load of each device that is used, as a part of its rate."""
    device = {device.name: device for device in given.devices}
    return [pool.rate / device[pool.device].rate for pool in placed.pools]


def _error_at(given: Problem, placed: Placement, num_bytes: int) -> float:
    """The error at which the same placement takes that many bytes, by bisection."""
    families = {family.name: family for family in given.families}
    indices = {family.name: {v: number for number, v in enumerate(family.variants)} for family in given.families}
    low, high = 1e-6, 1.0
    for _ in range(30):
        error = (low * high) ** 0.5
        total = 0.0
        for pool in placed.pools:
            family = families[pool.family]
            index = indices[pool.family]
            rows = [index[name] for name in pool.shares]
            bits = delta_bits(family.distance[rows, index[pool.base]], error, family.stored_bits)
            total += family.expert_bytes * (1 + float(bits.sum()) / family.stored_bits)
            total += family.nonexpert_bytes * len(rows)
        low, high = (error, high) if total > num_bytes else (low, error)
    return high


def _with_another(family: Family, rng: np.random.Generator) -> Family:
    """One variant more, a fine-tune of a random one."""
    parent = int(rng.integers(len(family.variants)))
    row = np.sqrt(family.distance[parent] ** 2 + 0.05**2).astype(np.float32)
    distance = np.pad(family.distance, (0, 1))
    distance[-1, :-1] = distance[:-1, -1] = row
    return replace(family, variants=(*family.variants, f"{family.name}-new"), distance=distance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("variants", 10_000), ("devices", 500), ("families", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    given = problem(options.variants, options.devices, options.families, options.seed)
    print(json.dumps(compare(given, options.seed)))


if __name__ == "__main__":
    main()
