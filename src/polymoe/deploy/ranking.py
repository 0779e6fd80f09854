"""Which replica a request goes to, as a pure function: the one that will be done with it soonest.

Waiting behind a request costs 1. Loading a variant into a slot costs `RELOAD`, whether it is the request's own or, when
a slot is taken from a variant that is in use, that one's later; a prompt whose beginning the replica knows saves
`PREFIX`. The router's own picture of the slots fills the time between two reports of a replica.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

RELOAD = 12.0
_RECENT = 10.0  # seconds that a variant counts as in use after a request of it
PREFIX = 1.0
_MOST_PREFIXES = 8192


@dataclass
class Slots:
    """What the router believes to be in the slots of one replica, least recently used first."""

    size: int
    used: OrderedDict[str, float] = field(default_factory=OrderedDict)  # variant -> when a request last went there

    def touch(self, variant: str, now: float) -> None:
        self.used[variant] = now
        self.used.move_to_end(variant)
        while len(self.used) > self.size:
            self.used.popitem(last=False)

    def report(self, loaded: Collection[str], taken_at: float) -> None:
        """A replica says what was loaded at `taken_at`; what was routed there since stays."""
        later = {variant: when for variant, when in self.used.items() if when > taken_at}
        known = [(variant, self.used.get(variant, 0.0)) for variant in loaded if variant not in later]
        self.used = OrderedDict(sorted([*known, *later.items()], key=lambda item: item[1]))
        while len(self.used) > self.size:
            self.used.popitem(last=False)


class Ranking:
    """Ranks replicas, which have any names, for one request after the other."""

    def __init__(self) -> None:
        self._slots: dict[str, Slots] = {}
        self._reports: dict[str, float] = {}
        self._others: dict[str, int] = {}  # replica -> sequences of other ingresses, as last reported
        self._prefixes: OrderedDict[str, str] = OrderedDict()

    def report(self, replica: str, size: int, loaded: Collection[str], taken_at: float, others: int = 0) -> None:
        """What a replica says of its slots, and how much work it has from others; the same report again changes
        nothing."""
        if self._reports.get(replica) == taken_at:
            return
        self._reports[replica] = taken_at
        self._others[replica] = max(0, others)
        slots = self._slots.setdefault(replica, Slots(size))
        slots.size = size
        slots.report(loaded, taken_at)

    def forget(self, present: Collection[str]) -> None:
        """Only these replicas are left."""
        for replica in self._slots.keys() - set(present):
            del self._slots[replica]
            self._reports.pop(replica, None)
            self._others.pop(replica, None)

    def order(self, queues: Sequence[tuple[str, int]], variant: str, prefix: str, now: float) -> list[str]:
        """Replicas, the best first. queues: (replica, sequences of ours that it works on)."""
        known = self._prefixes.get(prefix) if prefix else None

        def cost(entry: tuple[str, int]) -> tuple[float, float]:
            replica, queue = entry
            slots = self._slots.get(replica)
            load, oldest = 0.0, 0.0
            if slots is not None and variant not in slots.used:
                load = RELOAD
                if len(slots.used) >= slots.size:
                    oldest = next(iter(slots.used.values()))
                    load += RELOAD * max(0.0, 1.0 - (now - oldest) / _RECENT)
            return queue + self._others.get(replica, 0) + load - (PREFIX if replica == known else 0.0), oldest

        return [replica for replica, _ in sorted(queues, key=cost)]

    def chosen(self, replica: str, variant: str, prefix: str, now: float) -> None:
        """The request went there."""
        if (slots := self._slots.get(replica)) is not None:
            slots.touch(variant, now)
        if prefix:
            self._prefixes[prefix] = replica
            self._prefixes.move_to_end(prefix)
            while len(self._prefixes) > _MOST_PREFIXES:
                self._prefixes.popitem(last=False)
