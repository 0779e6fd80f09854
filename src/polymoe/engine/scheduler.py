"""Which tokens run in the next step: continuous batching with chunked prefill and preemption by recomputation.

There are no phases. Every sequence has tokens whose keys and values are not computed yet. A step gives each running
sequence at its end the one token it waits for; the rest of the step's tokens go to prompts, by turns of the flows
(variant and tenant), the most urgent of a flow first. A sequence whose last token is computed samples a new one.

How much and whose turn it is, is decided by the policies (`policies.py`); here is how it is carried out.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from polymoe.engine.admission import has_room
from polymoe.engine.block_manager import BlockManager
from polymoe.engine.outlook import look_out
from polymoe.engine.places import Places
from polymoe.engine.policies import Policies
from polymoe.engine.request import TokenLogprobs, TokenOutput
from polymoe.engine.sequence import Sequence
from polymoe.engine.slot_policy import VariantWork
from polymoe.engine.step_plan import PrefillQueues, ScheduledSequence, StepPlan
from polymoe.engine.waiting_queue import WaitingQueue
from polymoe.errors import OverloadedError

__all__ = ["SampledToken", "ScheduledSequence", "Scheduler"]


@dataclass(frozen=True)
class SampledToken:
    """What the runner drew for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """Owns all sequences and their blocks.

    Args:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens a step.
        max_waiting: requests waiting beyond this are refused (`OverloadedError`).
        max_model_len: [V] longest sequence of each variant, in tokens.
        clock: seconds; the one that the policies were made with.
        reconfigurations: how many there were so far, and their seconds.
    """

    def __init__(
        self,
        blocks: BlockManager,
        policies: Policies,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        max_model_len: list[int],
        clock: Callable[[], float] = time.monotonic,
        reconfigurations: Callable[[], tuple[int, float]] = lambda: (0, 0.0),
    ) -> None:
        self.policies, self.clock = policies, clock
        self.max_num_batched_tokens, self.max_waiting = max_num_batched_tokens, max_waiting
        self.max_model_len = max_model_len
        self.waiting = WaitingQueue()
        self.places = Places(blocks, self.waiting, policies.fair, max_num_seqs, clock)
        self.upcoming_variants: list[int] = []  # that wait for a slot, the next one first
        # Since the start, a variant each: tokens computed, first tokens that came later than their class promised.
        self.tokens_served = [0] * len(max_model_len)
        self.deadline_misses = [0] * len(max_model_len)
        self._reconfigurations = reconfigurations
        self._step_started = (0.0, 0, 0.0)  # time, reconfigurations until then, their seconds

    @property
    def running(self) -> list[Sequence]:
        return self.places.running

    @property
    def sequences(self) -> Iterable[Sequence]:
        yield from self.running
        yield from self.waiting

    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `OverloadedError` if the queue is full or its first token would come too late."""
        weights = self.policies.fair.weights
        share = weights[sequence.variant] / sum(weights)
        if not has_room(self.max_waiting, len(self.waiting), self.waiting.count(sequence.variant), share):
            raise OverloadedError(f"{len(self.waiting)} requests are waiting; try again later.", retry_after=1.0)
        if self.has_work():  # an idle engine can only be as fast as it is
            self.policies.admission.check(
                sequence.ttft_target,
                lambda: look_out(
                    sequence, self.policies, self.places, self.waiting, self.max_num_batched_tokens, self.clock()
                ),
            )
        else:
            self.policies.admission.started()
        self.waiting.add(sequence)

    def abort(self, request_ids: set[str]) -> list[Sequence]:
        """Forget these sequences and free their blocks; unknown ids are finished ones and fine."""
        gone = [s for s in self.sequences if s.request_id in request_ids]
        self._drop(gone)
        return gone

    # --- the plan of a step

    def schedule(self) -> list[ScheduledSequence]:
        """Choose this step's tokens and give their sequences the blocks for them."""
        now = self.clock()
        self._step_started = (now, *self._reconfigurations())
        plan = self._plan(now, self._allowed_variants(now))
        if not plan.chosen and plan.allowed is not None and self.has_work():
            # All places or blocks are held by sequences that do not lose them, while it is not their turn.
            plan = self._plan(now, self._variants_of_the_oldest(now))
        return [ScheduledSequence(s, n) for s, n in plan.chosen.items()]

    def _plan(self, now: float, allowed: frozenset[int] | None) -> StepPlan:
        plan = StepPlan(self.max_num_batched_tokens, allowed)
        self.running.sort(key=lambda s: s.rank)
        for sequence in list(self.running):
            if sequence.num_uncomputed == 1 and plan.budget > 0 and plan.allows(sequence):
                self.places.grow(sequence, 1, plan)
        limit = self.policies.budget.prefill_tokens(len(plan.chosen), plan.budget)
        beyond, plan.budget = plan.budget - limit, limit
        queues = PrefillQueues(plan, self.running, self.waiting)
        self._serve_urgent(now, queues, plan)
        self._serve_by_turns(queues, plan)
        self.policies.fair.settle(self._active_variants(), queues.contended)
        plan.budget += beyond
        return plan

    def _serve_urgent(self, now: float, queues: PrefillQueues, plan: StepPlan) -> None:
        """Requests that would miss their deadline if they waited for their turn come before it: with at most half of
        the step, and for no more than their flow can pay back within a few turns."""
        cost = self.policies.cost
        reserved = plan.budget // 2
        for sequence in sorted(queues.heads(), key=lambda s: s.deadline):
            if sequence.ttft_target is None or sequence.num_output_tokens > 0 or not cost.ready:
                continue
            needed = 2 * cost.prefill_seconds(plan.left(sequence), len(plan.chosen), plan.budget)
            late = sequence.deadline - needed < now < sequence.deadline
            most = min(plan.left(sequence), plan.budget - reserved)
            if late and most > 0 and self.policies.fair.may_overdraw(sequence.flow):
                self._give(sequence, most, queues, plan)

    def _serve_by_turns(self, queues: PrefillQueues, plan: StepPlan) -> None:
        """The rest of the step, as the round robin says. A variant that is far ahead of the others, and
        has more to do than fits a step, keeps it short for them."""
        fair = self.policies.fair
        for sequence in queues.heads():
            fair.enter(sequence.flow)
        active = self._active_variants()
        courtesy = self.policies.budget.courtesy_tokens(len(plan.chosen), plan.budget)
        backlog = queues.backlog()
        allowance = {
            v: courtesy if fair.is_greedy(v, active) and backlog[v] > self.max_num_batched_tokens else plan.budget
            for v in active
        }
        for flow in queues.idle_flows():
            queues.drop(flow)
        while plan.budget > 0 and queues.ready:
            flow, most = fair.turn(queues.ready)
            head, budget = queues.head(flow), plan.budget
            if head is None or allowance[flow[0]] <= 0:
                queues.drop(flow)
                continue
            self._give(head, min(most, plan.left(head), budget, allowance[flow[0]]), queues, plan)
            allowance[flow[0]] -= budget - plan.budget

    def _give(self, sequence: Sequence, most: int, queues: PrefillQueues, plan: StepPlan) -> None:
        """Up to `most` tokens for the head of a flow, which may have to be admitted first."""
        if sequence not in self.waiting:
            self.places.grow(sequence, most, plan)
        elif self.places.admit(sequence, most, plan):
            queues.started(sequence)
        else:
            queues.blocked.add(sequence.flow)

    # --- variants

    def _active_variants(self) -> set[int]:
        return {s.variant for s in self.running} | {v for v, _ in self.waiting.flows()}

    def _allowed_variants(self, now: float) -> frozenset[int] | None:
        """With fewer slots than variants, or a limit on the variants of a step: those that may run. None: all."""
        slots, mix = self.policies.slots, self.policies.mix
        if slots is None and mix is None:
            return None
        work = self._work_by_variant()
        allowed = frozenset(work)
        if slots is not None:
            allowed = slots.choose(now, work)
            self.upcoming_variants = slots.upcoming(work)
        if mix is not None:
            allowed &= mix.choose(now, {v: w for v, w in work.items() if v in allowed})
        return allowed

    def _variants_of_the_oldest(self, now: float) -> frozenset[int]:
        oldest = sorted(self.sequences, key=lambda s: (s in self.waiting, s.arrival))
        variants = list(dict.fromkeys(s.variant for s in oldest))
        allowed = frozenset(variants)
        for policy in (self.policies.slots, self.policies.mix):
            if policy is not None:
                allowed = policy.force(now, [v for v in variants if v in allowed])
        return allowed

    def _work_by_variant(self) -> dict[int, VariantWork]:
        cost, slots = self.policies.cost, self.policies.slots
        load = 0.0 if slots is None else slots.cost
        work: dict[int, VariantWork] = {}
        full = len(self.running) >= self.places.max_num_seqs
        for sequence in self.sequences:
            known = work.get(sequence.variant, VariantWork())
            arrived = sequence.arrival[0]
            first_since, start_by = math.inf, math.inf
            if sequence.num_output_tokens == 0:
                if not full or sequence not in self.waiting:
                    first_since = arrived
                if sequence.ttft_target is not None:
                    start_by = sequence.deadline - load - cost.seconds(sequence.num_uncomputed, 0)
            work[sequence.variant] = VariantWork(
                min(known.since, arrived), min(known.first_since, first_since), min(known.start_by, start_by)
            )
        return {v: known for v, known in work.items() if self.places.can_run((v, ""))}

    # --- the end of a step

    def update(self, scheduled: list[ScheduledSequence], sampled: dict[str, SampledToken]) -> list[TokenOutput]:
        """Book the step's progress, append sampled tokens, and finish what is finished."""
        outputs = []
        finished = []
        now = self.clock()
        self._measure(scheduled, now)
        for item in scheduled:
            sequence = item.sequence
            self.places.advance(sequence, item.num_tokens)
            self.tokens_served[sequence.variant] += item.num_tokens
            token = sampled.get(sequence.request_id)
            if token is None:
                continue
            first = sequence.num_output_tokens == 0
            sequence.token_ids.append(token.token_id)
            if first:
                sequence.first_token_time = now
                late = sequence.ttft_target is not None and now > sequence.deadline
                self.deadline_misses[sequence.variant] += late
            reason, stop = self._finish_reason(sequence)
            if reason is not None:
                finished.append(sequence)
            wants_prompt = first and sequence.request.sampling.prompt_logprobs is not None
            outputs.append(
                TokenOutput(
                    request_id=sequence.request_id,
                    new_token_ids=[token.token_id],
                    logprobs=None if token.logprobs is None else [token.logprobs],
                    prompt_logprobs=sequence.prompt_logprobs if wants_prompt else None,
                    finish_reason=reason,
                    stop_reason=stop,
                    num_cached_tokens=sequence.num_cached_tokens,
                    queue_time=sequence.first_scheduled_time - sequence.added_time,
                    prefill_time=sequence.first_token_time - sequence.first_scheduled_time,
                    decode_time=now - sequence.first_token_time,
                )
            )
        if finished:
            self.policies.admission.ended(len(finished))
        self._drop(finished)
        return outputs

    def _measure(self, scheduled: list[ScheduledSequence], now: float) -> None:
        """Tell the policies how long the step and its reconfigurations took."""
        started, count, seconds = self._step_started
        new_count, new_seconds = self._reconfigurations()
        if new_count > count and self.policies.slots is not None:
            self.policies.slots.observe((new_seconds - seconds) / (new_count - count))
        decodes = sum(item.sequence.num_uncomputed == 1 for item in scheduled)
        tokens = sum(item.num_tokens for item in scheduled) - decodes
        self.policies.cost.observe(tokens, decodes, now - started - (new_seconds - seconds))

    def _finish_reason(self, sequence: Sequence) -> tuple[str | None, int | None]:
        sampling = sequence.request.sampling
        last = sequence.token_ids[-1]
        if sequence.num_output_tokens >= sampling.min_tokens and last in sequence.request.stop_token_ids:
            return "stop", last
        if sequence.num_output_tokens >= sampling.max_tokens:
            return "length", None
        if len(sequence.token_ids) >= self.max_model_len[sequence.variant]:
            return "length", None
        return None, None

    def _drop(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        self.places.leave(set(sequences))

    def check_integrity(self) -> None:
        """No block is lost, and no sequence is in two places."""
        self.places.check_integrity()
        assert len({id(s) for s in self.sequences}) == len(self.running) + len(self.waiting)
