"""Placement without looking at distances: the rule to beat."""

from __future__ import annotations

from collections.abc import Iterable

from polymoe.place.shelves import Shelves


def first_fit(shelves: Shelves, order: Iterable[int]) -> None:
    """Each variant, in `order`, on the first device with room for it; a busy one on several. Raises `PlanError`."""
    for variant in order:
        share, rate = 1.0, shelves.rates[variant]
        for shelf in range(len(shelves.devices)):
            if shelves.bytes[shelf] + shelves.price(int(variant))[shelf] > shelves.memory[shelf]:
                continue
            free = shelves.limit * shelves.capacity[shelf] - shelves.load[shelf]
            part = share if rate * share <= free else min(share, max(0.0, free) / rate)
            if part < share and rate <= 0.5 * shelves.limit * shelves.capacity[shelf]:
                continue
            if part > 0:
                shelves.add(shelf, int(variant), part)
                shelves.recentre(shelf)  # the best base of those that came
                share -= part
            if share <= 1e-6:
                break
        if share > 1e-6:
            shelves.put(int(variant), share)
