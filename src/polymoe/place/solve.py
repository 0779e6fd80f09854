"""Who lives with whom in one family: a greedy start, then a transport problem solved again and again.

With the bases given, assigning variants to devices is a linear program (HiGHS): the bytes that variants add are to be
few, each variant's shares sum to 1, and no device has more load or bytes than it may. A vertex of it splits few
variants, and those are the ones with replicas. With the variants given, the best base of a device is its medoid. The
two alternate, as in k-means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.spatial.distance import squareform

from polymoe.place.shelves import Shelves

_ROUNDS = 3


def solve(shelves: Shelves) -> None:
    """Fill empty shelves. Raises `PlanError` when the variants do not fit."""
    best: list[dict[int, float]] | None = None
    best_bytes = np.inf
    bases = _start(shelves)
    for _ in range(_ROUNDS):
        shares = _transport(shelves, bases)
        if shares is None:
            break
        _fill(shelves, bases, shares)
        total = float(shelves.bytes.sum())
        if total >= best_bytes * 0.999:
            if total < best_bytes:
                best = [dict(members) for members in shelves.members]
            break
        best, best_bytes = [dict(members) for members in shelves.members], total
        bases = [base if base >= 0 else old for base, old in zip(shelves.base, bases, strict=True)]
    _clear(shelves)
    if best is not None:
        for shelf, members in enumerate(best):
            for variant, share in members.items():
                shelves.add(shelf, variant, share)
            shelves.recentre(shelf)
    else:  # the program has no solution with these bases: one variant after the other, the hottest first
        for variant in np.argsort(-shelves.rates, kind="stable"):
            shelves.put(int(variant))
        for shelf in range(len(shelves.devices)):
            shelves.recentre(shelf)


def _start(shelves: Shelves) -> list[int]:
    """Bases: the leaves of a dendrogram in order, cut into stretches of each device's part of the load."""
    count, rates = len(shelves.family.variants), shelves.rates
    if count > 1:
        tree = linkage(squareform(shelves.family.distance, checks=False), method="average")
        order = leaves_list(tree)
    else:
        order = np.zeros(1, dtype=np.int64)
    weights = rates + rates.sum() / count + 1e-12  # variants that nobody asks for take memory too
    ends = np.cumsum(weights[order])
    cuts = np.cumsum(shelves.capacity) / shelves.capacity.sum() * ends[-1]
    bases, begin = [], 0.0
    for end in cuts:
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        stretch = order[min(first, count - 1) : max(last, first) + 1]
        costs = shelves.added[np.ix_(stretch, stretch)].sum(axis=0)
        bases.append(int(stretch[int(costs.argmin())]))
        begin = float(end)
    return bases


def _transport(shelves: Shelves, bases: list[int]) -> NDArray[np.float64] | None:
    """[V, J] shares, or None where there is no solution. Each variant may go to some of the cheapest devices first, to
    more where that leaves no solution."""
    count, num = len(shelves.family.variants), len(bases)
    price = shelves.added[:, bases].astype(np.float64) / shelves.family.expert_bytes
    fair = shelves.rates.sum() / shelves.capacity.sum()
    for limit, width in ((shelves.limit, 10), (shelves.limit, num), (1.0, num)):
        reach = np.minimum(num, width + np.ceil(2 * shelves.rates / (fair * shelves.capacity.min() + 1e-12))).astype(
            int
        )
        ranks = np.argsort(np.argsort(price, axis=1, kind="stable"), axis=1, kind="stable")
        rows, columns = np.nonzero(ranks < reach[:, None])
        cells = np.arange(len(rows))
        costs = price[rows, columns]
        sums = csr_array((np.ones(len(rows)), (rows, cells)), shape=(count, len(rows)))
        limits = csr_array(
            (np.concatenate([shelves.rates[rows], costs]),
             (np.concatenate([columns, columns + num]), np.concatenate([cells, cells]))),
            shape=(2 * num, len(rows)),
        )  # fmt: skip
        bounds = np.concatenate([limit * shelves.capacity, shelves.memory / shelves.family.expert_bytes - 1])
        if (bounds < 0).any():
            bounds = np.maximum(bounds, 0.0)
        rows_of: dict[str, Any] = {"A_ub": limits, "b_ub": bounds, "A_eq": sums, "b_eq": np.ones(count)}
        found = linprog(costs, bounds=(0, 1), method="highs", **rows_of)
        if found.status == 0:
            shares = np.zeros((count, num))
            shares[rows, columns] = found.x
            return shares
        if width >= num and limit >= 1.0:
            break
    return None


def _fill(shelves: Shelves, bases: list[int], shares: NDArray[np.float64]) -> None:
    """Whole variants where the program splits one that a device can serve; the rest is its replicas."""
    _clear(shelves)
    shelves.base = list(bases)
    for variant in np.argsort(-shelves.rates, kind="stable"):
        row, rate = shares[variant], shelves.rates[variant]
        parts = np.flatnonzero(row > 1e-6)
        if len(parts) > 1:
            # A part is worth a copy when it is a good part of a device's load.
            kept = parts[row[parts] * rate > 0.1 * shelves.limit * shelves.capacity[parts]]
            parts = kept if len(kept) else parts[[int(row[parts].argmax())]]
        for part in parts:
            shelves.add(int(part), int(variant), float(row[part] / row[parts].sum()))
    for shelf in range(len(bases)):
        shelves.recentre(shelf)
    shelves.relieve()
    for shelf in range(len(bases)):
        shelves.recentre(shelf)


def _clear(shelves: Shelves) -> None:
    num = len(shelves.devices)
    shelves.base, shelves.members = [-1] * num, [{} for _ in range(num)]
    shelves.bytes, shelves.load = np.zeros(num), np.zeros(num)
