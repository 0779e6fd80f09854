"""Which variants the next step may have, where there are fewer slots than variants or a step may not mix all."""

import math
from collections.abc import Iterator

from polymoe.engine.policies.policies import Policies
from polymoe.engine.policies.slot_policy import VariantWork
from polymoe.engine.scheduling.running_batch import RunningBatch
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.waiting_queue import WaitingQueue


class VariantTurns:
    """Asks the policies for slots and for mixing, and tells them what each variant has to do."""

    def __init__(self, policies: Policies, batch: RunningBatch, waiting: WaitingQueue) -> None:
        self._policies, self._batch, self._waiting = policies, batch, waiting
        self.upcoming: list[int] = []  # that wait for a slot, the next one first

    def active(self) -> set[int]:
        """Those with sequences."""
        return {s.variant for s in self._batch.running} | {v for v, _ in self._waiting.flows()}

    def allowed(self, now: float) -> frozenset[int] | None:
        """With fewer slots than variants, or a limit on the variants of a step: those that may run. None: all."""
        slots, mix = self._policies.slots, self._policies.mix
        if slots is None and mix is None:
            return None
        work = self._work_by_variant()
        allowed = frozenset(work)
        if not work:
            return allowed
        if slots is not None:
            allowed = slots.choose(now, work)
            self.upcoming = slots.upcoming(work)
        if mix is not None:
            allowed &= mix.choose(now, {v: w for v, w in work.items() if v in allowed})
        return allowed

    def of_the_oldest(self, now: float) -> frozenset[int]:
        """Those that run whatever the policies would say: as many as there are slots, the oldest sequence's first."""
        oldest = sorted(self._able(), key=lambda s: (s in self._waiting, s.arrival))
        variants = list(dict.fromkeys(s.variant for s in oldest))
        allowed = frozenset(variants)
        for policy in (self._policies.slots, self._policies.mix):
            if policy is not None:
                allowed = policy.force(now, [v for v in variants if v in allowed])
        return allowed

    def _work_by_variant(self) -> dict[int, VariantWork]:
        cost, slots = self._policies.cost, self._policies.slots
        load = 0.0 if slots is None else slots.cost
        work: dict[int, VariantWork] = {}
        full = len(self._batch.running) >= self._batch.max_num_seqs
        for sequence in self._able():
            known = work.get(sequence.variant, VariantWork())
            arrived = sequence.arrival[0]
            first_since, start_by = math.inf, math.inf
            if sequence.num_output_tokens == 0:
                if not full or sequence not in self._waiting:
                    first_since = arrived
                if sequence.ttft_target is not None:
                    start_by = sequence.deadline - load - cost.seconds(sequence.num_uncomputed, 0)
            work[sequence.variant] = VariantWork(
                min(known.since, arrived), min(known.first_since, first_since), min(known.start_by, start_by)
            )
        return {v: known for v, known in work.items() if self._batch.can_run((v, ""))}

    def _able(self) -> Iterator[Sequence]:
        """Sequences with something to compute; the others wait for their last token to be known."""
        return (s for s in self._batch.sequences if s.num_uncomputed > 0)
