"""Which variants may run while there are fewer slots than variants.

A loaded variant stays while it has work, so that one reconfiguration serves many requests. A variant outside becomes
due when it has waited for `patience` times the measured cost of a load, or when the deadline of one of its requests
would be missed if it waited any longer. A variant that is due gets the slot of the one loaded longest, but not before
that one had its minimum stay of `stay` times the cost: reconfigurations never take more than 1 / (1 + stay) of the
time, and no two variants play ping-pong. A loaded variant without work gives up its slot at once.

The variant that became due first comes first, so the waiting of each is bounded, with C the cost of a load, S slots
and V variants:

    patience · C + ⌈(V - S) / S⌉ · ((1 + stay) · C + one step)

With a cost of zero (a limit on the variants of a step, nothing is loaded) this is round robin, step by step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_SMOOTHING = 0.2  # weight of the newest measurement of a load


@dataclass(frozen=True)
class VariantWork:
    """Why a variant wants a slot. Times are seconds of the scheduler's clock."""

    since: float  # its oldest request arrived
    start_by: float = math.inf  # a load that begins later misses the deadline of a request


class SlotPolicy:
    """Chooses the variants of the next step.

    Args:
        num_slots: S.
        loaded: what is in the slots at the start.
        stay: minimum stay of a variant, in multiples of the cost of a load.
        patience: after this multiple of the cost a waiting variant is due.
    """

    def __init__(self, num_slots: int, loaded: Iterable[int], *, stay: float = 4.0, patience: float = 8.0) -> None:
        self._num_slots, self._stay, self._patience = num_slots, stay, patience
        self._loaded_at = dict.fromkeys(list(loaded)[:num_slots], -math.inf)  # the variants that may run
        self._served_at: dict[int, float] = {}  # when a variant last had a slot and work
        self._measured = False
        self.cost = 0.0  # seconds of a load

    @property
    def active(self) -> frozenset[int]:
        return frozenset(self._loaded_at)

    def observe(self, seconds: float) -> None:
        """A load took so long."""
        self.cost = seconds if not self._measured else self.cost + _SMOOTHING * (seconds - self.cost)
        self._measured = True

    def choose(self, now: float, work: Mapping[int, VariantWork]) -> frozenset[int]:
        """The variants that may run in the step that begins now."""
        self._served_at.update((v, now) for v in self._loaded_at if v in work)
        fresh: set[int] = set()
        for variant in self.upcoming(work):
            if len(self._loaded_at) == self._num_slots:
                victim = self._victim(now, work, fresh, due=now >= self._due(variant, work[variant]))
                if victim is None:
                    break
                del self._loaded_at[victim]
            self._loaded_at[variant] = self._served_at[variant] = now
            fresh.add(variant)
        return self.active

    def force(self, now: float, variants: Iterable[int]) -> frozenset[int]:
        """These and no others, whatever the rule says (the scheduler could run nothing else)."""
        self._loaded_at = {v: self._loaded_at.get(v, now) for v in variants}
        return self.active

    def upcoming(self, work: Mapping[int, VariantWork]) -> list[int]:
        """The variants that wait for a slot, the next one first."""
        return sorted((v for v in work if v not in self._loaded_at), key=lambda v: (self._due(v, work[v]), v))

    def wait(self, now: float, variant: int) -> float:
        """Seconds until a request of `variant` that arrives now can run, at the most; 0 if it can at once."""
        if variant in self._loaded_at:
            return 0.0
        ripe = min(self._loaded_at.values(), default=-math.inf) + (1 + self._stay) * self.cost
        return max(self._patience * self.cost, ripe - now) + self.cost

    def _due(self, variant: int, work: VariantWork) -> float:
        waiting_since = max(work.since, self._served_at.get(variant, -math.inf))
        return min(waiting_since + self._patience * self.cost, work.start_by)

    def _victim(self, now: float, work: Mapping[int, VariantWork], fresh: set[int], due: bool) -> int | None:
        """Whose slot is free for another: one without work, or one that had its minimum stay if that other is due."""
        idle = [v for v in self._loaded_at if v not in work]
        if idle:
            return min(idle, key=lambda v: self._served_at.get(v, -math.inf))
        stay = (1 + self._stay) * self.cost
        ripe = [v for v, at in self._loaded_at.items() if v not in fresh and now - at >= stay]
        return min(ripe, key=lambda v: self._loaded_at[v]) if due and ripe else None
