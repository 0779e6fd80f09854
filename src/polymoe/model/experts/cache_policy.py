"""Which fetched expert to keep: pure bookkeeping, so that policies can be compared on recorded accesses.

`FrequencyPolicy` is what the expert cache uses; the others are what it is measured against (test_cache_policy.py).
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Protocol

_CLEARLY = 1.25


class CachePolicy(Protocol):
    """Decides about keys of equal size; `room` entries fit."""

    def access(self, key: Hashable) -> bool:
        """Note an access; whether the key was in the cache. A missing key is brought in if the policy wants it."""

    def __contains__(self, key: Hashable) -> bool: ...


class LRUPolicy:
    """Keep what was used last."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def access(self, key: Hashable) -> bool:
        hit = key in self._keys
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self.room:
            self._keys.popitem(last=False)
        return hit


class StaticPolicy:
    """Keep a fixed hot list."""

    def __init__(self, hot: Iterable[Hashable]) -> None:
        self._keys = frozenset(hot)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def access(self, key: Hashable) -> bool:
        return key in self._keys


class FrequencyPolicy:
    """Keep what was used often, where old uses count less and less.

    Each access adds 1 to a key's score; all scores halve every `half_life` accesses (kept by growing the increment
    instead, so that nothing is touched). A missing key is brought in only when its score clearly beats the lowest score
    in the cache: a pass over all experts (prefill touches each of them) cannot sweep out what decode comes back to.
    After O'Neil et al. 1993 and TinyLFU (Einziger et al. 2017): admission by frequency with ageing.
    """

    def __init__(self, room: int, half_life: float | None = None) -> None:
        self.room = room
        self._growth = 2.0 ** (1.0 / (half_life or 16.0 * max(room, 1)))
        self._increment = 1.0
        self._scores: dict[Hashable, float] = {}
        self._keys: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    @property
    def keys(self) -> frozenset[Hashable]:
        """What is in the cache."""
        return frozenset(self._keys)

    def access(self, key: Hashable, times: int = 1) -> bool:
        """As the protocol says; `times` accesses at once count as much, and are decided about once."""
        self._increment *= self._growth**times
        self._scores[key] = self._scores.get(key, 0.0) + times * self._increment
        if self._increment > 1e100:
            self._scores = {k: s / self._increment for k, s in self._scores.items()}
            self._increment = 1.0
        if key in self._keys:
            return True
        if len(self._keys) < self.room:
            self._keys.add(key)
        elif self._keys:
            lowest = min(self._keys, key=self._scores.__getitem__)
            if self._scores[lowest] * _CLEARLY < self._scores[key]:
                self._keys.remove(lowest)
                self._keys.add(key)
        return False
