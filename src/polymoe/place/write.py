"""A placement as a deploy configuration, and why it is so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

from polymoe.config import format_bytes
from polymoe.place.cost import delta_bits
from polymoe.place.problem import Family, PlacedPool, Placement, Problem


def deploy_toml(problem: Problem, placement: Placement) -> str:
    """The text of the file. Devices that hold the same are one pool with replicas."""
    sources = {name: path for family in problem.families for name, path in family.sources.items()}
    lines = [
        "# Written by `polymoe place`. [server] and each pool's cpus, gpus and [pool.engine] are yours to add.",
        "",
    ]
    numbers: dict[str, int] = {}
    for pools in _alike(placement):
        first = pools[0]
        number = numbers.get(first.family, 0)
        numbers[first.family] = number + 1
        names = sorted(first.shares, key=lambda name: (name != first.base, name))  # the base first
        total = {name: sum(pool.shares[name] for pool in pools) for name in names}
        lines += [
            "[[pool]]",
            f"name = {json.dumps(f'{first.family}-{number}')}",
            f"family = {json.dumps(first.family)}",
            f"sources = {json.dumps([f'{name}={sources.get(name, name)}' for name in names])}",
            f"memory = {json.dumps(_budget(first.num_bytes))}",
            f"replicas = {len(pools)}",
            f"devices = {json.dumps([pool.device for pool in pools])}",
            "shares = {" + ", ".join(f"{json.dumps(name)} = {min(1.0, total[name]):.6g}" for name in names) + "}",
            "",
        ]
    return "\n".join(lines)


def _alike(placement: Placement) -> list[list[PlacedPool]]:
    """Pools with one base and one set of variants, together."""
    found: dict[tuple[str, str, frozenset[str]], list[PlacedPool]] = {}
    for pool in placement.pools:
        found.setdefault((pool.family, pool.base, frozenset(pool.shares)), []).append(pool)
    return list(found.values())


def _budget(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f}MiB"


def explain(problem: Problem, placement: Placement) -> Iterator[str]:
    """Why each pool is what it is, line by line."""
    families = {family.name: family for family in problem.families}
    devices = {device.name: device for device in problem.devices}
    homes = placement.homes()
    for pool in placement.pools:
        device, family = devices[pool.device], families[pool.family]
        yield (
            f"{pool.device}: family {pool.family}, {len(pool.shares)} variants, {format_bytes(pool.num_bytes)} of "
            f"{format_bytes(device.memory)}, {pool.rate:.2f} of {device.rate:g} requests a second. Base {pool.base}: "
            f"its {format_bytes(family.expert_bytes)} of experts are stored whole."
        )
        yield from _members(family, pool, problem.error, homes)
    for family in problem.families:
        mine = [pool for pool in placement.pools if pool.family == family.name]
        rate = sum(pool.rate for pool in mine)
        yield (
            f"Family {family.name}: {len(family.variants)} variants on {len(mine)} devices, {rate:.2f} requests a "
            f"second, {format_bytes(sum(pool.num_bytes for pool in mine))}; every variant whole: "
            f"{format_bytes((family.expert_bytes + family.nonexpert_bytes) * len(family.variants))}."
        )


def _members(family: Family, pool: PlacedPool, error: float, homes: Mapping[str, frozenset[str]]) -> Iterator[str]:
    index = {name: number for number, name in enumerate(family.variants)}
    distances = family.distance[:, index[pool.base]]
    bits = delta_bits(distances, error, family.stored_bits)
    for name in sorted(pool.shares, key=lambda name: float(distances[index[name]])):
        number = index[name]
        copies = len(homes[name])
        share = f"; {pool.shares[name]:.0%} of its requests, as it is on {copies} devices" if copies > 1 else ""
        nearest = ""
        if name != pool.base and len(family.variants) > 1:
            others = np.delete(np.arange(len(family.variants)), number)
            best = int(others[int(family.distance[number, others].argmin())])
            apart = family.variants[best] not in pool.shares
            nearest = f"; its nearest, {family.variants[best]}, found no room here" if apart else ""
        yield (
            f"  {name}: distance {float(distances[number]):.2%}, {float(bits[number]):.1f} bits a weight"
            f"{share}{nearest}"
        )
