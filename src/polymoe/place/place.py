"""`place`: which variants live on which device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from polymoe.errors import ConfigError, PlanError
from polymoe.place.cost import variant_bytes
from polymoe.place.problem import Device, Family, PlacedPool, Placement, Problem
from polymoe.place.shelves import Shelves


def place(problem: Problem, present: Placement | None = None) -> Placement:
    """Similar variants share a device, busy ones have replicas, and no device has more than its memory or its rate.

    present: what runs now. Variants stay where they are, new ones go where they cost fewest bytes, and somebody moves
    only from a device that would hold or serve more than it can. Without it everything is placed anew.

    Raises `PlanError` where it does not fit; the message says what to add or to drop. `ConfigError` without SciPy.
    """
    allotted = _allot(problem, present)
    pools: list[PlacedPool] = []
    for family, devices in zip(problem.families, allotted, strict=True):
        shelves = shelves_of(problem, family, devices)
        if present is None:
            try:
                from polymoe.place.solve import solve
            except ImportError as error:
                raise ConfigError("placement needs SciPy: pip install 'polymoe[place]'.") from error
            solve(shelves)
        else:
            _keep(shelves, present)
        pools += shelves.pools()
    return Placement(tuple(pools))


def shelves_of(problem: Problem, family: Family, devices: Sequence[Device]) -> Shelves:
    """Empty ones, whose limit is the family's part of these devices' rate and `problem.slack` more."""
    rates = np.array([problem.rates[name] for name in family.variants], dtype=np.float64)
    fair = rates.sum() / sum(device.rate for device in devices)
    return Shelves(family, devices, rates, problem.error, max(fair * (1 + problem.slack), 1e-9))


def _keep(shelves: Shelves, present: Placement) -> None:
    number = {device.name: shelf for shelf, device in enumerate(shelves.devices)}
    mine = [pool for pool in present.pools if pool.family == shelves.family.name]
    shelves.take((number[pool.device], pool.base, pool.shares) for pool in mine if pool.device in number)
    placed = np.zeros(len(shelves.family.variants))
    for members in shelves.members:
        for variant, share in members.items():
            placed[variant] += share
    shelves.relieve()
    for variant in np.argsort(-shelves.rates, kind="stable"):
        if placed[variant] < 1 - 1e-6:  # new, or a device of it is gone
            shelves.put(int(variant), float(1 - placed[variant]))


def _allot(problem: Problem, present: Placement | None) -> list[list[Device]]:
    """Devices of each family; a device holds variants of one family. Raises `PlanError` when there are too few."""
    taken: Mapping[str, str] = {} if present is None else {pool.device: pool.family for pool in present.pools}
    allotted: list[list[Device]] = [
        [device for device in problem.devices if taken.get(device.name) == family.name] for family in problem.families
    ]
    free = sorted((device for device in problem.devices if device.name not in taken), key=lambda d: -d.memory)
    needs = [_need(problem, family) for family in problem.families]
    total = sum(load for load, _ in needs) or 1.0
    if not free:
        if empty := [f.name for f, devices in zip(problem.families, allotted, strict=True) if not devices]:
            raise PlanError(f"no device is free for family {empty[0]}; add one, or place everything anew.")
        return allotted
    for device in free:

        def lack(number: int) -> tuple[bool, float, float]:
            """How much a family is in want of a device: none at all, then memory, then its part of the load."""
            load, memory = needs[number]
            mine = allotted[number]
            rate, room = sum(d.rate for d in mine), sum(d.memory for d in mine)
            base = problem.families[number].expert_bytes * len(mine)
            smallest = problem.families[number].expert_bytes + problem.families[number].nonexpert_bytes
            return (
                not mine and smallest <= device.memory,  # noqa: B023
                max(0.0, (memory + base) / max(room, 1.0) - 1.0) if mine else 1e9,
                load / total - rate / sum(d.rate for d in problem.devices),
            )

        allotted[max(range(len(needs)), key=lack)].append(device)
    for family, devices in zip(problem.families, allotted, strict=True):
        load = sum(problem.rates[name] for name in family.variants)
        if not devices:
            raise PlanError(
                f"there are {len(problem.devices)} devices for {len(problem.families)} families, and none is left for "
                f"{family.name}: a device holds variants of one family. Add a device or drop a family."
            )
        if load > (rate := sum(device.rate for device in devices)):
            raise PlanError(
                f"family {family.name}: {load:.1f} requests a second for {len(devices)} devices that serve {rate:.1f}; "
                f"add devices for {load - rate:.1f} more, or lower rates."
            )
    return allotted


def _need(problem: Problem, family: Family) -> tuple[float, float]:
    """(requests a second, bytes of the variants beside the bases, when they are as near to one as half of them are)."""
    added = variant_bytes(family, problem.error)
    typical = float(np.median(added)) if len(added) > 1 else float(added[0, 0])
    return sum(problem.rates[name] for name in family.variants), typical * len(family.variants)
