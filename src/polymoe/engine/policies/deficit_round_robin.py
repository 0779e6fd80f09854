"""Deficit round robin over the flows that share one resource.

Shreedhar & Varghese, "Efficient Fair Queueing using Deficit Round Robin", SIGCOMM 1995: flows stand in a ring; each
visit adds the flow's quantum to its deficit, and a flow may take what its deficit covers. Two things are added:

- A flow that was idle for a round comes before the busy ones, for one quantum (RFC 8290, section 4.2: the list of new
  flows). So a flow that asks for little hardly waits, whatever the others do.
- What a flow takes outside its turn (decoded tokens) is charged too and may leave it in debt, for which later rounds
  are skipped.
"""

from collections import deque
from collections.abc import Callable, Container, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# Debts beyond this many quanta are forgiven, so that no flow ever waits for more rounds than these.
MAX_DEBT = 4


class DeficitRoundRobin(Generic[K]):
    """Whose turn it is. One call of `turn` costs O(1) amortised while flows have work.

    Args:
        quantum: tokens that a visit adds to a flow's deficit, more than 0.
    """

    def __init__(self, quantum: Callable[[K], float]) -> None:
        self._quantum = quantum
        self._deficit: dict[K, float] = {}  # of the flows in either ring
        self._new: deque[K] = deque()
        self._old: deque[K] = deque()
        self._rested: set[K] = set()  # flows in the old ring that were visited while they had nothing to do

    def enter(self, key: K) -> None:
        """The flow has work. Idempotent; flows that enter together take their first turns in that order."""
        if key not in self._deficit:
            self._deficit[key] = self._quantum(key)
            self._new.append(key)
        elif key in self._rested:
            self._rested.discard(key)
            if self._deficit[key] + self._quantum(key) > 0:
                self._old.remove(key)
                self._deficit[key] += self._quantum(key)
                self._new.append(key)

    def turn(self, ready: Container[K]) -> K:
        """The flow among `ready` that may take tokens now; at least one of them must have entered."""
        while True:
            ring = self._new or self._old
            key = ring[0]
            if key in ready and self._deficit[key] > 0:
                return key
            ring.popleft()
            if key in ready:
                self._deficit[key] += self._quantum(key)
            elif ring is self._old:
                if self._deficit[key] >= 0:
                    del self._deficit[key]
                    self._rested.discard(key)
                    continue
                self._deficit[key] = min(0.0, self._deficit[key] + self._quantum(key))
                self._rested.add(key)
            self._old.append(key)

    def credit(self, key: K) -> float:
        """Tokens that the flow may take in this turn; negative: its debt."""
        return self._deficit.get(key, 0.0)

    def charge(self, key: K, tokens: float) -> None:
        """The flow took tokens, in its turn or not; negative: it gave them back."""
        if key not in self._deficit:
            self._deficit[key] = 0.0
            self._old.append(key)
            self._rested.add(key)
        self._deficit[key] = max(self._deficit[key] - tokens, -MAX_DEBT * self._quantum(key))

    def clear(self) -> None:
        """Everybody got all they wanted: what was taken did no harm, and shares that were not used are gone."""
        self._deficit.clear()
        self._new.clear()
        self._old.clear()
        self._rested.clear()
