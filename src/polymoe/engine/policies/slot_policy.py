"""Which variants may run while there are fewer slots than variants.

A loaded variant stays while it has work, so that one reconfiguration serves many requests; without work it gives up its
slot at once. A variant outside becomes due

- `patience` times the measured cost of a load after it could run last, or
- already `eagerness` times that cost after the arrival of a request that has no token yet, or
- when the deadline of a request would be missed if it waited any longer.

A variant that is due takes the slot of the one loaded longest, provided that time for it was saved up: of the time
that passes, one part in `stay` may go into such loads, and no more than `_SAVINGS` of them can follow each other. So
however requests alternate, what is loaded stays for `stay` times the cost of a load on average (no ping-pong), and yet
a single request hardly waits while loads are rare. (A token bucket, as networks use it to bound bursts.)

Of those that are due, requests without a token come first, in the order of their arrival (a first token takes one step,
the others many), but never twice in a row past a variant that became due before them. So the wait of each is bounded,
with C the cost of a load, S slots and V variants:

    patience · C + 2 · (V - S) · ((1 + stay) · C + one step)

With a cost of zero (a limit on the variants of a step, nothing is loaded; or loads that the staging row hides) this is
round robin, step by step, with new requests let in between.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_STAY, _PATIENCE, _EAGERNESS = 10.0, 20.0, 2.0  # see above
_SMOOTHING = 0.2  # part of the newest measurement of a load
_SAVINGS = 2.0  # loads


@dataclass(frozen=True)
class VariantWork:
    """Why a variant wants a slot. Times are seconds of the scheduler's clock; infinite: there is no such request."""

    since: float = math.inf  # its oldest request arrived
    first_since: float = math.inf  # the oldest of those without a token arrived
    start_by: float = math.inf  # a load that begins later misses the deadline of a request


class SlotPolicy:
    """Chooses the variants of the next step.

    Args:
        num_slots: S.
        loaded: what is in the slots at the start.
    """

    def __init__(self, num_slots: int, loaded: Iterable[int]) -> None:
        self._num_slots = num_slots
        self._loaded_at = dict.fromkeys(list(loaded)[:num_slots], -math.inf)  # the variants that may run
        self._served_at: dict[int, float] = {}  # when a variant last had a slot and work
        self._saved = math.inf  # seconds that loads may take now
        self._saved_at = 0.0
        self._measured = False
        self._let_in = False  # the last step was given to a new request, past a variant that was due before it
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
        self._saved = min(self._saved + (now - self._saved_at) / _STAY, _SAVINGS * self.cost)
        self._saved_at = now
        self._served_at.update((v, now) for v in self._loaded_at if v in work)
        fresh: set[int] = set()
        kept = self._kept_for_new_requests(work)
        first_due = next((v for v in self._by_turn(work) if now >= self._due(v, work[v])), None)
        for variant in self.upcoming(work):
            idle = [v for v in self._loaded_at if v not in work]
            busy = [v for v in self._loaded_at if v in work and v not in fresh and v not in kept]
            if len(self._loaded_at) < self._num_slots:
                pass
            elif idle:
                del self._loaded_at[min(idle, key=lambda v: self._served_at.get(v, -math.inf))]
            elif busy and now >= self._due(variant, work[variant]) and self._saved >= self._needed(work[variant]):
                del self._loaded_at[min(busy, key=lambda v: self._loaded_at[v])]
                self._saved -= self.cost
            else:
                break
            self._loaded_at[variant] = self._served_at[variant] = now
            fresh.add(variant)
        self._let_in = first_due is not None and first_due not in self._loaded_at
        return self.active

    def force(self, now: float, variants: Iterable[int]) -> frozenset[int]:
        """These and no others, whatever the rule says (the scheduler could run nothing else)."""
        self._loaded_at = {v: self._loaded_at.get(v, now) for v in list(variants)[: self._num_slots]}
        return self.active

    def upcoming(self, work: Mapping[int, VariantWork]) -> list[int]:
        """The variants that wait for a slot, the next one first."""
        waiting = self._by_turn(work)
        if self._let_in:
            return waiting
        return sorted(waiting, key=lambda v: work[v].first_since)  # a stable sort: the others stay in turn

    def _by_turn(self, work: Mapping[int, VariantWork]) -> list[int]:
        """The variants that wait for a slot, the one that is due first before the others."""
        return sorted((v for v in work if v not in self._loaded_at), key=lambda v: (self._due(v, work[v]), v))

    def _kept_for_new_requests(self, work: Mapping[int, VariantWork]) -> set[int]:
        """Loaded variants with a request without a token that came before all of those outside."""
        if self._let_in:
            return set()
        outside = min((w.first_since for v, w in work.items() if v not in self._loaded_at), default=math.inf)
        return {v for v in self._loaded_at if v in work and work[v].first_since < outside}

    def wait(self, now: float, variant: int) -> float:
        """Seconds until a request of `variant` that arrives now can run if no other is before it; 0: at once."""
        if variant in self._loaded_at:
            return 0.0
        saved = self._saved + (now - self._saved_at) / _STAY
        return max(_EAGERNESS * self.cost, _STAY * (self.cost - saved)) + self.cost

    def _needed(self, work: VariantWork) -> float:
        """Savings for a load now, seconds: those for one more are kept for the next request without a token."""
        return self.cost if min(work.first_since, work.start_by) < math.inf else _SAVINGS * self.cost

    def _due(self, variant: int, work: VariantWork) -> float:
        served = self._served_at.get(variant, -math.inf)
        return min(
            max(work.since, served) + _PATIENCE * self.cost,
            max(work.first_since, served) + _EAGERNESS * self.cost,
            work.start_by,
        )
