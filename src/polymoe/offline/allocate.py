"""Policy `auto`: for every position the way to store it, so that the bytes go where they save the most damage.

A knapsack with one choice a position: all options of all positions are priced in nats + λ · bytes, which is the lower
convex hull of each position walked by damage saved per byte; λ is halved in until the budget is met, and what is then
left is spent greedily. The variants' weights in the sum are raised where a variant comes off worse than the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from polymoe.config import format_bytes
from polymoe.errors import PlanError
from polymoe.offline.damage import Energies, FloatArray, Partition
from polymoe.offline.merge import exact_delta_bytes
from polymoe.offline.plan import NO_DELTA, STORED, Plan
from polymoe.offline.sizes import ExpertSizes

if TYPE_CHECKING:
    from polymoe.offline.calibrate import Calibration
    from polymoe.offline.family import Family
    from polymoe.offline.scan import FamilyScan

BASES = ("int3", "int4", "int5", "int6", "int8", "stored")
DELTAS = ("d1", "d2", "d3", "d4", "d5")
WORST_TO_MEAN = 2.0  # how far the worst variant may be above the mean
_ROUNDS = 12  # of reweighting the variants


@dataclass(frozen=True)
class Option:
    """One way to store a position. `groups`: variants by base. `merge`: "own" or "merged"."""

    groups: Partition
    base: str
    merge: str
    delta: str
    num_bytes: int
    damage: tuple[float, ...]  # [V], nats a token


class Choices:
    """The options of all positions as arrays: `bytes` [P, O] and `damage` [P, O, V], inf where there is no option."""

    def __init__(self, options: list[list[Option]]) -> None:
        self.options = options
        most = max(len(row) for row in options)
        num_variants = len(options[0][0].damage)
        self.bytes = np.full((len(options), most), np.inf)
        self.damage = np.full((len(options), most, num_variants), np.inf)
        for p, row in enumerate(options):
            self.bytes[p, : len(row)] = [option.num_bytes for option in row]
            self.damage[p, : len(row)] = [option.damage for option in row]

    @property
    def least_bytes(self) -> int:
        return int(self.bytes.min(axis=1).sum())

    def total(self, chosen: NDArray[np.int64]) -> tuple[int, FloatArray]:
        """(bytes, damage [V]) of one option a position."""
        rows = np.arange(len(chosen))
        return int(self.bytes[rows, chosen].sum()), self.damage[rows, chosen].sum(axis=0)

    def solve(self, budget: int, weights: FloatArray) -> NDArray[np.int64]:
        """int [P]: the options with the least Σ_v weight_v · damage_v in `budget` bytes (at least `least_bytes`)."""
        damage = np.where(np.isfinite(self.bytes), np.where(np.isfinite(self.damage), self.damage, 0) @ weights, np.inf)
        low, high = 0.0, 1e-30  # nats a byte
        best = self._cheapest(damage)
        while self.total(self._priced(damage, high))[0] > budget and high < 1e30:
            high *= 16
        for _ in range(60):
            middle = np.sqrt(low * high) if low > 0 else high / 16
            chosen = self._priced(damage, middle)
            if self.total(chosen)[0] <= budget:
                best, high = chosen, middle
            else:
                low = middle
        return self._spend(best, damage, budget)

    def _cheapest(self, damage: FloatArray) -> NDArray[np.int64]:
        least = self.bytes.min(axis=1, keepdims=True)
        chosen: NDArray[np.int64] = np.where(self.bytes == least, damage, np.inf).argmin(axis=1)
        return chosen

    def _priced(self, damage: FloatArray, price: float) -> NDArray[np.int64]:
        chosen: NDArray[np.int64] = (damage + price * self.bytes).argmin(axis=1)
        return chosen

    def _spend(self, chosen: NDArray[np.int64], damage: FloatArray, budget: int) -> NDArray[np.int64]:
        """Use what is left of the budget, the best step first."""
        chosen, rows = chosen.copy(), np.arange(len(chosen))
        left = budget - self.total(chosen)[0]
        while True:
            extra = self.bytes - self.bytes[rows, chosen][:, None]
            saved = damage[rows, chosen][:, None] - damage
            useful = (extra <= left) & (saved > 0) & np.isfinite(extra)
            if not useful.any():
                return chosen
            gain = np.full(extra.shape, -np.inf)
            gain[useful] = saved[useful] / np.maximum(extra[useful], 1e-9)
            p, option = np.unravel_index(int(gain.argmax()), gain.shape)
            left -= int(extra[p, option])
            chosen[p] = option

    def solve_bounded(self, budget: int) -> NDArray[np.int64]:
        """The least mean damage of all answers whose worst variant is within `WORST_TO_MEAN` of the mean; where none
        is, the one with the best worst variant."""
        num_variants = self.damage.shape[2]
        weights = np.full(num_variants, 1 / num_variants)
        found = []
        for _ in range(_ROUNDS if num_variants > 1 else 1):
            chosen = self.solve(budget, weights)
            damage = self.total(chosen)[1]
            mean, worst = float(damage.mean()), float(damage.max())
            found.append((worst > WORST_TO_MEAN * mean, worst if worst > WORST_TO_MEAN * mean else mean, chosen))
            if mean <= 0:
                break
            weights = weights * np.maximum(damage / mean, 1e-3) ** 0.5
            weights /= weights.sum()
        return min(found, key=lambda one: one[:2])[2]


def auto_plan(
    family: Family,
    scan: FamilyScan,
    budget_bytes: int | None = None,
    min_top1: float | None = None,
    calibration: Calibration | None = None,
    console: Console | None = None,
) -> Plan:
    """The plan with the least predicted damage for `budget_bytes` of bases and deltas, or the fewest bytes for which
    every variant is predicted to agree with its original on a share `min_top1` of tokens.

    Everything is resident. Raises `PlanError` for a budget below the minimum, with what that would cost.
    """
    assert (budget_bytes is None) != (min_top1 is None)
    if calibration is None:
        energies = Energies.of_weights(family, scan, console)
    else:
        from polymoe.offline.calibrated_damage import energies_on_text

        energies = energies_on_text(family, scan, calibration, console)
    choices = Choices(position_options(family, scan, energies, console))
    if min_top1 is not None:
        chosen = fewest_bytes(choices, (np.maximum(0.0, 1 - min_top1) / energies.top1_per_root_kl) ** 2)
    else:
        assert budget_bytes is not None
        _check_minimum(choices, budget_bytes, scan)
        chosen = choices.solve_bounded(budget_bytes)
    return _plan(choices, chosen, scan, "mean" if calibration is None else "regmean")


def fewest_bytes(choices: Choices, limit: FloatArray) -> NDArray[np.int64]:
    """The cheapest answer, to one part in a thousand, in which no variant's damage is above `limit` [V]."""
    low, high = choices.least_bytes, int(np.where(np.isfinite(choices.bytes), choices.bytes, 0).max(axis=1).sum())

    def answer(budget: int) -> NDArray[np.int64] | None:
        chosen = choices.solve_bounded(budget)
        return chosen if bool((choices.total(chosen)[1] <= limit).all()) else None

    best = answer(high)
    assert best is not None, "separate experts have no damage"
    cheapest = answer(low)
    if cheapest is not None:
        return cheapest
    while high - low > low // 1000 + 1:
        middle = (low + high) // 2
        found = answer(middle)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, choices.total(found)[0])
    return best


def position_options(
    family: Family, scan: FamilyScan, energies: Energies, console: Console | None = None
) -> list[list[Option]]:
    """All options of each position, layer-major: merged bases of each format with and without deltas of each format,
    in one group, two and one a version; separate experts as stored; exact deltas."""
    sizes = ExpertSizes.of(family)
    each = {name: sizes(name) for name in (*BASES, *DELTAS)}
    exact = exact_delta_bytes(family, scan, console) if len(scan.variant_names) > 1 else None
    num_variants, num_layers, num_experts = scan.expert_version.shape
    nothing = (0.0,) * num_variants
    found = []
    for layer, expert in np.ndindex(num_layers, num_experts):
        version = scan.expert_version[:, layer, expert]
        versions = len(np.unique(version))
        own: Partition = tuple(tuple(int(v) for v in (version == first).nonzero()[0]) for first in np.unique(version))
        options = [Option(own, STORED, "own", NO_DELTA, versions * each[STORED], nothing)]
        for n, partition in enumerate(energies.partitions[layer][expert]):
            alone = len(partition) == versions
            deltas = () if alone and versions > 1 else DELTAS
            signed = (
                tuple(f"±{name}" for name in DELTAS) if num_variants == 2 and len(partition) == 1 < versions else ()
            )
            for base in BASES:
                for delta in (NO_DELTA, *deltas, *signed):
                    if alone and base == STORED:
                        continue  # lossless already, above
                    size = len(partition) * each[base]
                    if delta != NO_DELTA:
                        size += each[delta.removeprefix("±")] * (1 if delta.startswith("±") else versions)
                    damage = energies.damage(layer, expert, n, base, delta)
                    merge = "own" if alone else "merged"
                    options.append(Option(partition, base, merge, delta, size, tuple(damage.tolist())))
        if exact is not None and versions > 1:
            changed = sum(int(exact[v, layer, expert]) for v in {int(v) for v in version} - {int(version[0])})
            changed += 8 * (versions + 1) * len(sizes.tensors)  # where each delta's values start
            together: Partition = (tuple(range(num_variants)),)
            options.append(Option(together, STORED, "own", "exact", each[STORED] + changed, nothing))
        found.append(options)
    return found


def _check_minimum(choices: Choices, budget: int, scan: FamilyScan) -> None:
    least = choices.least_bytes
    if budget >= least:
        return
    damage = choices.total(choices.solve(least, np.ones(choices.damage.shape[2])))[1]
    one_model = scan.expert_bytes * scan.expert_version[0].size
    raise PlanError(
        f"the experts are left {format_bytes(budget)} ({max(budget, 0) / one_model:.3g}x of one model's); the minimum "
        f"is {format_bytes(least)} ({least / one_model:.3g}x), which is predicted to cost {damage.mean():.2g} nats a "
        f"token (worst variant {damage.max():.2g}). Give more --memory, or fetch experts from the host tier with "
        "--policy separate or paper."
    )


def _plan(choices: Choices, chosen: NDArray[np.int64], scan: FamilyScan, merge: str) -> Plan:
    version = scan.expert_version
    _, num_layers, num_experts = version.shape
    serving = np.zeros_like(version)
    base, merges, delta = (np.empty((num_layers, num_experts), dtype=object) for _ in range(3))
    for p, option in enumerate(chosen.tolist()):
        layer, expert = divmod(p, num_experts)
        one = choices.options[p][option]
        for group in one.groups:
            serving[list(group), layer, expert] = min(group)
        base[layer, expert], delta[layer, expert] = one.base, one.delta
        merges[layer, expert] = "own" if one.merge == "own" else merge
    damage = choices.total(chosen)[1]
    everywhere = np.ones(version.shape, dtype=np.bool_)
    plan = Plan("auto", serving, everywhere, base=base, merge=merges, delta=delta, predicted_damage=damage)
    return plan.with_shared_deltas(version)
