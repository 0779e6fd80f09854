"""What was counted of each variant since the start, by name: versions come and go, and their counters stay."""

from collections.abc import Mapping

from polymoe.engine.scheduling.scheduler import Scheduler
from polymoe.protocol.info import VariantInfo

_NAMES = ("prefix_cache_queries", "prefix_cache_hits", "preemptions", "tokens_served", "deadline_misses")


class Counters:
    """Reads the scheduler's counters, which are by place."""

    def __init__(self, scheduler: Scheduler) -> None:
        batch = scheduler.batch
        self._scheduler = scheduler
        self._lists = dict(
            zip(
                _NAMES,
                (
                    batch.prefix_queries, batch.prefix_hits, batch.preemptions, scheduler.tokens_served,
                    scheduler.deadline_misses,
                ),
                strict=True,
            )
        )  # fmt: skip
        self._retired: dict[str, list[int]] = {}

    def retire(self, place: int, name: str) -> None:
        """A version is gone: what was counted at its place stays with the name, and the place begins anew."""
        self._retired[name] = self._added(name, place, self._retired)
        for values in self._lists.values():
            values[place] = 0

    def by_name(self, variants: Mapping[int, VariantInfo]) -> tuple[list[str], dict[str, list[int]]]:
        """(names, counter -> a value for each of them). `variants`: by place."""
        total = {name: list(values) for name, values in self._retired.items()}
        for place, info in variants.items():
            total[info.name] = self._added(info.name, place, total)
        columns = {counter: [values[i] for values in total.values()] for i, counter in enumerate(_NAMES)}
        return list(total), columns

    def _added(self, name: str, place: int, to: Mapping[str, list[int]]) -> list[int]:
        known = to.get(name, [0] * len(_NAMES))
        return [a + values[place] for a, values in zip(known, self._lists.values(), strict=True)]
