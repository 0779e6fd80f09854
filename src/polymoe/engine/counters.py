"""What was counted since the start, of each variant by name: versions come and go, and their counters stay."""

import bisect
from collections.abc import Mapping

import numpy as np

from polymoe.engine.scheduling.scheduler import Scheduler
from polymoe.engine.scheduling.step_record import ScheduledSequence
from polymoe.model.served_model import ServedModel
from polymoe.protocol.info import STEP_TOKENS_BOUNDS, EngineStats, VariantInfo

_NAMES = ("prefix_cache_queries", "prefix_cache_hits", "preemptions", "tokens_served", "deadline_misses")


class Counters:
    """Reads those of the scheduler, which are by place, and of the model.

    Args: `variants`: by place, as they are at any time.
    """

    def __init__(self, scheduler: Scheduler, model: ServedModel, variants: Mapping[int, VariantInfo]) -> None:
        batch = scheduler.batch
        self._scheduler, self._model, self._variants = scheduler, model, variants
        self._num_planned = len(variants)
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
        self._step_tokens, self._step_tokens_sum = [0] * (len(STEP_TOKENS_BOUNDS) + 1), 0

    def count(self, scheduled: list[ScheduledSequence]) -> None:
        """A step."""
        num_tokens = sum(len(item.input_ids) for item in scheduled)
        self._step_tokens[bisect.bisect_left(STEP_TOKENS_BOUNDS, num_tokens)] += 1
        self._step_tokens_sum += num_tokens

    def retire(self, place: int, name: str) -> None:
        """A version is gone: what was counted at its place stays with the name, and the place begins anew."""
        self._retired[name] = self._added(name, place, self._retired)
        for values in self._lists.values():
            values[place] = 0

    def stats(self, added_bytes: int, routing: bool) -> EngineStats:
        """`routing`: with what was routed since that was last asked for."""
        running, waiting = self._scheduler.running, [*self._scheduler.waiting, *self._scheduler.held]
        slots, tier = self._model.slots, self._model.pool.cache.stats
        names, counted = self._by_name()
        places = {name: [place for place, info in self._variants.items() if info.name == name] for name in names}
        loaded = slots.loaded if slots.num_slots < self._num_planned else None  # None: all of them, always
        return EngineStats(
            names=names,
            in_flight={
                info.version: sum(s.variant == place for s in (*running, *waiting))
                for place, info in self._variants.items()
            },
            added_bytes=added_bytes,
            running=[sum(s.variant in places[name] for s in running) for name in names],
            waiting=[sum(s.variant in places[name] for s in waiting) for name in names],
            kv_usage=self._scheduler.batch.blocks.usage,
            **counted,
            reconfigurations=slots.stats.count,
            reconfiguration_seconds=slots.stats.seconds,
            reconfiguration_bytes=slots.stats.nbytes,
            expert_hits=tier.hits,
            expert_misses=tier.misses,
            expert_host_bytes=tier.host_bytes,
            expert_fetch_seconds=tier.seconds,
            resident_bytes=self._model.resident_bytes,
            step_tokens=tuple(self._step_tokens),
            step_tokens_sum=self._step_tokens_sum,
            loaded=[i for i, name in enumerate(names) if loaded is None or not loaded.isdisjoint(places[name])],
            routing=self._routing([places[name] for name in names]) if routing else None,
        )

    def _by_name(self) -> tuple[list[str], dict[str, list[int]]]:
        """(names, counter -> a value for each of them)."""
        total = {name: list(values) for name, values in self._retired.items()}
        for place, info in self._variants.items():
            total[info.name] = self._added(info.name, place, total)
        columns = {counter: [values[i] for values in total.values()] for i, counter in enumerate(_NAMES)}
        return list(total), columns

    def _added(self, name: str, place: int, to: Mapping[str, list[int]]) -> list[int]:
        known = to.get(name, [0] * len(_NAMES))
        return [a + values[place] for a, values in zip(known, self._lists.values(), strict=True)]

    def _routing(self, places: list[list[int]]) -> bytes:
        """What was routed, little-endian uint32 `[names, L, E]`: of each name, that of its places."""
        pool = self._model.pool
        counts = np.frombuffer(pool.routing_counts.take(), dtype="<u4").reshape(pool.table.shape)
        return np.stack([counts[own].sum(axis=0, dtype=np.uint32) for own in places]).astype("<u4").tobytes()
