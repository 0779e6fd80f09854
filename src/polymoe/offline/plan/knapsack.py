"""One option a position, so that the bytes leave the least quantisation error: the arithmetic of policy `auto`.

Two ways to an answer. Where predictions of single positions can be relied on (text), all options are priced in
nats + λ · bytes, which is the lower convex hull of each position walked by error saved per byte; λ is halved in until
the budget is met, and what is then left is spent greedily. Where they cannot (weights alone), the answer starts from
options that are the same everywhere and only moves up, to options that are no worse in any kind of it.
The variants' weights in the sum are raised where a variant comes off worse than the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from polymoe.offline.plan.quantisation_error import FloatArray, Partition

IntArray = NDArray[np.int64]

WORST_TO_MEAN = 2.0  # how far the worst variant may be above the mean
_ROUNDS = 12  # of reweighting the variants
_STARTS = 4  # uniform answers that are tried as starts, the best ones
_AS_GOOD = 1.001  # an option that is a thousandth worse in something is as good


@dataclass(frozen=True, eq=False)
class Option:
    """One way to store a position. `groups`: variants by base. `merge`: "own" or "merged"."""

    groups: Partition
    base: str
    merge: str
    delta: str
    num_bytes: int
    error: FloatArray  # [C, V], nats a token, by what it comes from (`QuantisationErrors.components`)


class Choices:
    """The options of all positions as arrays: `bytes` [P, O], `error` [P, O, V] and `components` [P, O, C] (summed
    over the variants), inf where there is no option.

    `uniform`: ways to store every position alike, name -> the option of each position, int [P].
    """

    def __init__(self, options: list[list[Option]], uniform: dict[str, IntArray] | None = None) -> None:
        self.options, self.uniform = options, uniform or {}
        most = max(len(row) for row in options)
        kinds, num_variants = options[0][0].error.shape
        self.bytes = np.full((len(options), most), np.inf)
        self.error = np.full((len(options), most, num_variants), np.inf)
        self.components = np.full((len(options), most, kinds), np.inf)
        for p, row in enumerate(options):
            self.bytes[p, : len(row)] = [option.num_bytes for option in row]
            self.error[p, : len(row)] = [option.error.sum(axis=0) for option in row]
            self.components[p, : len(row)] = [option.error.sum(axis=1) for option in row]

    @property
    def least_bytes(self) -> int:
        return int(self.bytes.min(axis=1).sum())

    @property
    def most_bytes(self) -> int:
        return int(np.where(np.isfinite(self.bytes), self.bytes, 0).max(axis=1).sum())

    def total(self, chosen: IntArray) -> tuple[int, FloatArray]:
        """(bytes, error [V]) of one option a position."""
        rows = np.arange(len(chosen))
        return int(self.bytes[rows, chosen].sum()), self.error[rows, chosen].sum(axis=0)

    def best(self, budget: int, trusted: bool) -> IntArray:
        """int [P]: the answer in `budget` bytes (at least `least_bytes`) whose worst variant is bounded. `trusted`:
        what is predicted for single positions can be relied on; else nothing is below the best uniform answer."""
        starts = [partial(self.climb, start, budget) for start in self._starts(budget)]
        knapsack = partial(self.solve, budget)
        ways = [knapsack, *starts[:1]] if trusted else starts or [knapsack]
        return min(map(self._bounded, ways), key=self._rank)

    def quick(self, budget: int, weights: FloatArray, trusted: bool) -> IntArray:
        """int [P]: about what `best` would give, without bounding the worst variant."""
        starts = [] if trusted else self._starts(budget)[:1]
        return self.climb(starts[0], budget, weights) if starts else self.solve(budget, weights)

    def _starts(self, budget: int) -> list[IntArray]:
        """The best uniform answers within the budget, by predicted error."""
        within = [chosen for chosen in self.uniform.values() if self.total(chosen)[0] <= budget]
        return sorted(within, key=lambda chosen: float(self.total(chosen)[1].mean()))[:_STARTS]

    def solve(self, budget: int, weights: FloatArray) -> IntArray:
        """int [P]: the options with the least Σ_v weight_v · error_v in `budget` bytes (at least `least_bytes`)."""
        error = self._weighted(weights)
        low, high = 0.0, 1e-30  # nats a byte
        best = self._cheapest(error)
        while self.total(self._priced(error, high))[0] > budget and high < 1e30:
            high *= 16
        for _ in range(60):
            middle = np.sqrt(low * high) if low > 0 else high / 16
            chosen = self._priced(error, middle)
            if self.total(chosen)[0] <= budget:
                best, high = chosen, middle
            else:
                low = middle
        return self._spend(best, error, budget, upwards=False)

    def climb(self, start: IntArray, budget: int, weights: FloatArray) -> IntArray:
        """int [P]: `start` improved within `budget` bytes by moves to options that are no worse in any component."""
        return self._spend(start, self._weighted(weights), budget, upwards=True)

    def _weighted(self, weights: FloatArray) -> FloatArray:
        known = np.isfinite(self.bytes)
        error: FloatArray = np.where(known, np.where(known[..., None], self.error, 0) @ weights, np.inf)
        return error

    def _cheapest(self, error: FloatArray) -> IntArray:
        least = self.bytes.min(axis=1, keepdims=True)
        chosen: IntArray = np.where(self.bytes == least, error, np.inf).argmin(axis=1)
        return chosen

    def _priced(self, error: FloatArray, price: float) -> IntArray:
        chosen: IntArray = (error + price * self.bytes).argmin(axis=1)
        return chosen

    def _spend(self, start: IntArray, error: FloatArray, budget: int, upwards: bool) -> IntArray:
        """Use what is left of the budget, the move that saves most a byte first. `upwards`: see `climb`."""
        chosen, left = start.copy(), budget - self.total(start)[0]

        def step(p: int) -> tuple[float, int, int] | None:
            """(−error saved a byte, position, option) of the best move that is affordable."""
            extra, saved = self.bytes[p] - self.bytes[p, chosen[p]], error[p, chosen[p]] - error[p]
            useful = (extra <= left) & np.isfinite(extra) & (saved > 0)
            if upwards:
                now = self.components[p, chosen[p]]
                useful &= (self.components[p] <= now + (_AS_GOOD - 1) * now.sum()).all(axis=1)
            if not useful.any():
                return None
            gain = np.full(len(useful), -np.inf)
            gain[useful] = saved[useful] / np.maximum(extra[useful], 1e-9)
            option = int(gain.argmax())
            return -float(gain[option]), p, option

        moves = [move for move in map(step, range(len(chosen))) if move is not None]
        heapq.heapify(moves)
        while moves:
            _, p, option = heapq.heappop(moves)
            extra = int(self.bytes[p, option] - self.bytes[p, chosen[p]])
            if extra <= left:
                chosen[p], left = option, left - extra
            if (move := step(p)) is not None:
                heapq.heappush(moves, move)
        return chosen

    def _rank(self, chosen: IntArray) -> tuple[bool, float]:
        """The smaller the better: the mean error where the worst variant is within bounds, else that variant's."""
        error = self.total(chosen)[1]
        beyond = bool(error.max() > WORST_TO_MEAN * error.mean())
        return beyond, float(error.max() if beyond else error.mean())

    def _bounded(self, solve: Callable[[FloatArray], IntArray]) -> IntArray:
        """The least mean error of all answers whose worst variant is within `WORST_TO_MEAN` of the mean; where none
        is, the one with the best worst variant. `solve`: weights [V] -> answer."""
        num_variants = self.error.shape[2]
        weights = np.full(num_variants, 1 / num_variants)
        found: list[IntArray] = []
        for _ in range(_ROUNDS):
            found.append(solve(weights))
            error = self.total(found[-1])[1]
            if len(found) == 1 and error.max() <= WORST_TO_MEAN * error.mean():
                break  # equal weights make the mean least
            weights = weights * np.maximum(error / error.mean(), 1e-3) ** 0.5
            weights /= weights.sum()
        return min(found, key=self._rank)


def fewest_bytes(choices: Choices, limit: FloatArray, trusted: bool) -> IntArray:
    """The cheapest answer, to one part in a thousand, in which no variant's error is above `limit` [V]."""
    low, high = choices.least_bytes, choices.most_bytes

    def answer(budget: int) -> IntArray | None:
        chosen = choices.best(budget, trusted)
        return chosen if bool((choices.total(chosen)[1] <= limit).all()) else None

    best = answer(high)
    assert best is not None, "separate experts have no error"
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
