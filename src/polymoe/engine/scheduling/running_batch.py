"""The running batch: who gets into it and who gets blocks of the KV cache, and who gives way when there is no more.

What is idle is anybody's. When it runs out, variants that hold clearly more than their share give way first, then
whoever is least urgent, but never the oldest of those that run: it keeps what it has and finishes, so that every
sequence finishes one day.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from polymoe.engine.policies.fair_share import FairShare, Flow
from polymoe.engine.scheduling.block_manager import BlockManager
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.sequence_blocks import SequenceBlocks
from polymoe.engine.scheduling.step_plan import StepPlan
from polymoe.engine.scheduling.waiting_queue import WaitingQueue


class RunningBatch:
    """The running sequences and their blocks.

    Args:
        waiting: where new ones come from and where those go that give way.
        max_num_seqs: sequences at most.
    """

    def __init__(
        self,
        blocks: BlockManager,
        waiting: WaitingQueue,
        fair: FairShare,
        max_num_seqs: int,
        clock: Callable[[], float],
    ) -> None:
        self.blocks, self.max_num_seqs = blocks, max_num_seqs
        self.running: list[Sequence] = []
        # Since the start, a variant each: tokens looked up in and found in the prefix cache, sequences put back.
        self.prefix_queries = [0] * len(fair.shares)
        self.prefix_hits = [0] * len(fair.shares)
        self.preemptions = [0] * len(fair.shares)
        self._waiting, self._fair, self._clock = waiting, fair, clock
        self._memory = SequenceBlocks(blocks)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """All that run or wait."""
        yield from self.running
        yield from self._waiting

    def grow(self, sequence: Sequence, count: int, plan: StepPlan) -> None:
        """Give a running sequence `count` tokens more. When blocks run out the least urgent sequences give way, those
        of a variant that holds far too many first; it may be this one."""
        if sequence in plan.preempted:
            return
        num_tokens = sequence.num_computed_tokens + plan.chosen.get(sequence, 0) + count
        missing = self._memory.missing(sequence, num_tokens)
        if missing <= 0:  # 15 of 16 steps
            self._book(sequence, count, plan)
            return
        while not self.blocks.can_allocate([], missing):
            held = _by_variant(self._held_blocks())
            over = self._fair.furthest_over(held, held.keys(), self.blocks.num_blocks)
            victim = self._least_urgent(lambda s, over=over: over in (None, s.variant))  # type: ignore[misc]
            victim = victim or self._least_urgent(lambda _: True)
            assert victim is not None, "a sequence alone always fits"
            self._preempt(victim, plan)
            plan.pressed = True
            if victim is sequence:
                return
        self._memory.grow(sequence, num_tokens)
        self._book(sequence, count, plan)

    def admit(self, sequence: Sequence, most: int, plan: StepPlan) -> bool:
        """Start a waiting sequence with up to `most` tokens, if the batch has room and there are blocks for it."""
        if sequence in plan.preempted or not self._has_room(sequence, plan):
            return False
        matched = self._memory.known_prefix(sequence)
        cached = len(matched) * self.blocks.block_size
        count = min(len(sequence.token_ids) - cached, most)
        wanted = self.blocks.blocks_for(cached + count) - len(matched)
        num_blocks = len(matched) + self._blocks_for(sequence, matched, wanted, plan)
        count = min(count, num_blocks * self.blocks.block_size - cached)
        if count <= 0:
            return False
        self._waiting.remove(sequence)
        self._memory.start(sequence, matched, cached + count)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = cached
            sequence.first_scheduled_time = self._clock()
            self.prefix_queries[sequence.variant] += len(sequence.token_ids)
            self.prefix_hits[sequence.variant] += cached
        self.running.append(sequence)
        self._book(sequence, count, plan)
        return True

    def _book(self, sequence: Sequence, count: int, plan: StepPlan) -> None:
        plan.give(sequence, count)
        self._fair.charge(sequence.flow, count)

    def _has_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        if len(self.running) < self.max_num_seqs:
            return True
        victim = self._overdrawn(sequence.flow, self._held_room(), 1, self.max_num_seqs)
        if victim is not None:
            self._preempt(victim, plan)
        return victim is not None

    def _blocks_for(self, sequence: Sequence, matched: list[int], wanted: int, plan: StepPlan) -> int:
        """Of the `wanted` blocks beside the `matched` ones those that a newcomer can have: all, or none, or, if it is
        older than whoever runs, what is left. Sequences of a variant above its share give up theirs for it. A step
        that had to preempt admits only who is entitled to it: whoever was just preempted would only be preempted
        again."""
        while plan.pressed or not self.blocks.can_allocate(matched, wanted):
            victim = self._overdrawn(sequence.flow, self._held_blocks(), wanted, self.blocks.num_blocks)
            if victim is None:
                oldest = all(sequence.arrival < s.arrival for s in self.running)
                return min(wanted, self.blocks.available(matched)) if oldest and not plan.pressed else 0
            if self.blocks.can_allocate(matched, wanted):
                break
            self._preempt(victim, plan)
        return wanted

    def _held_room(self) -> Counter[Flow]:
        return Counter(s.flow for s in self.running)

    def _held_blocks(self) -> Counter[Flow]:
        held: Counter[Flow] = Counter()
        for sequence in self.running:
            held[sequence.flow] += len(sequence.block_ids)
        return held

    def _overdrawn(self, flow: Flow, held: Counter[Flow], needed: int, capacity: int) -> Sequence | None:
        """Who gives way so that a flow gets its share: the least urgent of the variant furthest above its own, or of
        the tenant that holds most of the flow's own variant."""
        fair = self._fair
        variant, tenant = flow
        by_variant = _by_variant(held)
        waiting = self._waiting.flows()
        active = by_variant.keys() | {v for v, _ in waiting}
        if by_variant[variant] + needed <= fair.entitlement(variant, active, capacity):
            over = fair.furthest_over(by_variant, active, capacity)
            if over not in (None, variant):
                return self._least_urgent(lambda s: s.variant == over)
        by_tenant = {t: count for (v, t), count in held.items() if v == variant}
        tenants = by_tenant.keys() | {t for v, t in waiting if v == variant}
        largest = fair.largest_tenant(by_tenant, tenants, tenant, needed)
        return None if largest is None else self._least_urgent(lambda s: s.flow == (variant, largest))

    def _least_urgent(self, may: Callable[[Sequence], bool]) -> Sequence | None:
        """Of the running sequences that `may` give way. Never the oldest of all that run, so that it finishes."""
        oldest = min(self.running, key=lambda s: s.arrival)
        return max((s for s in self.running if s is not oldest and may(s)), key=lambda s: s.rank, default=None)

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self.running.remove(sequence)
        self._memory.release(sequence)
        sequence.num_preemptions += 1
        self.preemptions[sequence.variant] += 1
        self._waiting.add(sequence)
        self._fair.charge(sequence.flow, -plan.take_back(sequence))

    def remember_full(self, sequence: Sequence) -> None:
        """Let others find the blocks that are computed, once all their tokens are known."""
        self._memory.remember_full(sequence)

    def leave(self, sequences: set[Sequence]) -> None:
        """These have ended; those of them that run free their blocks."""
        for sequence in self.running:
            if sequence in sequences:
                self._memory.release(sequence)
        self.running = [s for s in self.running if s not in sequences]

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that the prefix cache holds now."""
        return len(self._memory.known_prefix(sequence)) * self.blocks.block_size

    def room_for(self, variant: int) -> float:
        """Sequences of the variant that can start at once: those the batch has room for, or that it is entitled to."""
        held = _by_variant(self._held_room())
        entitled = self._fair.entitlement(variant, held.keys(), self.max_num_seqs) - held[variant]
        return max(self.max_num_seqs - len(self.running), entitled if len(held.keys() | {variant}) > 1 else 0.0)

    def can_run(self, flow: Flow) -> bool:
        """Whether a step of this flow's variant would do anything: otherwise its turn would be wasted, or others would
        lose what they computed for it."""
        held = self._held_room()
        if any(variant == flow[0] for variant, _ in held):
            return True
        room = len(self.running) < self.max_num_seqs or self._overdrawn(flow, held, 1, self.max_num_seqs)
        block = self.blocks.num_free > 0 or self._overdrawn(flow, self._held_blocks(), 1, self.blocks.num_blocks)
        return bool(room and block)

    def check_integrity(self) -> None:
        """Every held block belongs to a running sequence, and enough of them for what is computed."""
        self.blocks.check_integrity()
        held = [b for s in self.running for b in s.block_ids]
        assert len(set(held)) == self.blocks.num_blocks - self.blocks.num_free
        for sequence in self.running:
            assert len(sequence.block_ids) * self.blocks.block_size >= sequence.num_computed_tokens
        assert not any(s.block_ids for s in self._waiting)


def _by_variant(held: Counter[Flow]) -> Counter[int]:
    total: Counter[int] = Counter()
    for (variant, _), count in held.items():
        total[variant] += count
    return total
