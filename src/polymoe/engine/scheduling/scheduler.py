"""Which tokens run in the next step: continuous batching with chunked prefill and preemption by recomputation.

There are no phases. Every sequence has tokens whose keys and values are not computed yet. A step gives each running
sequence at its end the one token it waits for; the rest of the step's tokens go to prompts, by turns of the flows
(variant and tenant), the most urgent of a flow first. A sequence whose last token is computed samples a new one.

A step is scheduled, launched, and updated when its tokens are known. The next one may be scheduled and launched before
that: its sequences have a `PENDING` token at their end then, whose value only the device knows.

How much and whose turn it is, is decided by the policies (`policies.py`); here is how it is carried out.
"""

import time
from collections.abc import Callable, Iterable

from polymoe.engine.policies.admission import has_room
from polymoe.engine.policies.policies import Policies
from polymoe.engine.scheduling.block_manager import BlockManager
from polymoe.engine.scheduling.load_estimate import estimate_load
from polymoe.engine.scheduling.running_batch import RunningBatch
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_plan import LaunchedStep, PrefillQueues, StepPlan
from polymoe.engine.scheduling.step_record import NO_TOKEN, NOTHING_ALLOWED, PENDING, ScheduledSequence, StepResult
from polymoe.engine.scheduling.variant_turns import VariantTurns
from polymoe.engine.scheduling.waiting_queue import WaitingQueue
from polymoe.errors import OverloadedError
from polymoe.protocol.request import SequenceId, TokenOutput


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
        self.held: list[Sequence] = []  # that wait for their grammar to be compiled, and then to run
        self.batch = RunningBatch(blocks, self.waiting, policies.fair, max_num_seqs, clock)
        self.variants = VariantTurns(policies, self.batch, self.waiting)
        # Since the start, a variant each: tokens computed, first tokens that came later than their class promised.
        self.tokens_served = [0] * len(max_model_len)
        self.deadline_misses = [0] * len(max_model_len)
        self._reconfigurations = reconfigurations
        self._planned: list[Sequence] = []  # those of the step that was scheduled last
        self._step_started = 0.0
        self._measured = (0.0, 0, 0.0)  # the end of the last step, reconfigurations until then, their seconds

    @property
    def running(self) -> list[Sequence]:
        return self.batch.running

    @property
    def sequences(self) -> Iterable[Sequence]:
        return [*self.batch.sequences, *self.held]

    def set_place(self, variant: int, max_model_len: int, share: float) -> None:
        """A variant comes to a place that had none, or goes (its share is next to nothing then)."""
        self.max_model_len[variant] = max_model_len
        self.policies.fair.shares[variant] = share

    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0 or bool(self.held)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `OverloadedError` if the queue is full or its first token would come too late."""
        shares = self.policies.fair.shares
        share = shares[sequence.variant] / sum(shares)
        waiting = len(self.waiting) + len(self.held)
        of_variant = self.waiting.count(sequence.variant) + sum(s.variant == sequence.variant for s in self.held)
        if not has_room(self.max_waiting, waiting, of_variant, share):
            raise OverloadedError(f"{waiting} requests are waiting; try again later.", retry_after=1.0)
        if self.has_work():  # an idle engine can only be as fast as it is
            self.policies.admission.check(
                sequence.ttft_target,
                lambda: estimate_load(
                    sequence, self.policies, self.batch, self.waiting, self.max_num_batched_tokens, self.clock()
                ),
            )
        else:
            self.policies.admission.started()
        limit = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
        sequence.max_len = min(limit, self.max_model_len[sequence.variant])
        self.policies.fair.weigh(sequence.request.qos.tenant, sequence.request.qos.weight)
        self.held.append(sequence)
        self._release()

    def _release(self) -> None:
        """To the queue with those whose grammar is compiled."""
        for sequence in [s for s in self.held if s.is_ready]:
            self.held.remove(sequence)
            self.waiting.add(sequence)

    def abort(self, request_ids: set[SequenceId]) -> list[Sequence]:
        """Forget these sequences and free their blocks; unknown ids are finished ones and fine."""
        gone = [s for s in self.sequences if s.request_id in request_ids]
        self._drop(gone)
        return gone

    # --- the plan of a step

    def schedule(self) -> list[ScheduledSequence]:
        """Choose this step's tokens and give their sequences the blocks for them."""
        self._release()
        now = self.clock()
        self._step_started = now
        plan = self._plan(now, self.variants.allowed(now))
        if not plan.chosen and plan.allowed is not None and any(s.num_uncomputed for s in self.sequences):
            # The batch is full, or all blocks are held, with sequences that do not give way and whose turn it is not.
            plan = self._plan(now, self.variants.of_the_oldest(now))
        self._planned = list(plan.chosen)
        return [sequence.scheduled(count) for sequence, count in plan.chosen.items()]

    def _plan(self, now: float, allowed: frozenset[int] | None) -> StepPlan:
        plan = StepPlan(self.max_num_batched_tokens, allowed)
        self.running.sort(key=lambda s: s.rank)
        for sequence in list(self.running):
            if sequence.num_uncomputed == 1 and plan.budget > 0 and plan.allows(sequence):
                self.batch.grow(sequence, 1, plan)
        limit = self.policies.budget.prefill_tokens(len(plan.chosen), plan.budget)
        beyond, plan.budget = plan.budget - limit, limit
        queues = PrefillQueues(plan, self.running, self.waiting)
        self._serve_urgent(now, queues, plan)
        self._serve_by_turns(queues, plan)
        self.policies.fair.settle(self.variants.active(), queues.contended)
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
        active = self.variants.active()
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
            self.batch.grow(sequence, most, plan)
        elif self.batch.admit(sequence, most, plan):
            queues.started(sequence)
        else:
            queues.blocked.add(sequence.flow)

    # --- the end of a step

    def launched(self, scheduled: list[ScheduledSequence]) -> LaunchedStep:
        """Book the progress of the step that was scheduled last and given to the device, as if it were done."""
        num_decodes = sum(item.num_tokens == 1 for item in scheduled)
        num_tokens = sum(item.num_tokens for item in scheduled)
        sequences = list(zip(self._planned, scheduled, strict=True))
        for sequence, item in sequences:
            self.tokens_served[sequence.variant] += item.num_tokens
            if sequence.ended:  # the step before was its last
                continue
            sequence.num_computed_tokens += item.num_tokens
            if item.samples:
                sequence.token_ids.append(PENDING)
        return LaunchedStep(sequences, self._step_started, num_decodes, num_tokens - num_decodes)

    def update(self, step: LaunchedStep, result: StepResult) -> list[TokenOutput]:
        """The step's tokens are known: put them into their sequences, and finish what is finished."""
        outputs = []
        finished = []
        now = self.clock()
        self._measure(step, now)
        for sequence, item in step.sequences:
            if sequence.ended:
                continue
            if (scored := result.prompt_logprobs.get(item.key)) is not None:
                # What a run before a preemption has already collected is kept.
                sequence.prompt_logprobs += scored[len(sequence.prompt_logprobs) - item.start :]
            token = result.sampled.get(item.key)
            if token is None:
                self.batch.remember_full(sequence)
                continue
            assert sequence.is_pending
            if token.token_id in (NO_TOKEN, NOTHING_ALLOWED):
                sequence.token_ids.pop()
                finished.append(sequence)
                refused = token.token_id == NOTHING_ALLOWED and sequence.request.is_constrained
                outputs.append(TokenOutput.failed(sequence.request_id, refused))
                continue
            sequence.token_ids[-1] = token.token_id
            self.batch.remember_full(sequence)
            first = sequence.num_output_tokens == 1
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

    def _measure(self, step: LaunchedStep, now: float) -> None:
        """Tell the policies how long the step (since it started, or the one before ended) and its reconfigurations
        took."""
        ended, count, seconds = self._measured
        new_count, new_seconds = self._reconfigurations()
        self._measured = now, new_count, new_seconds
        if new_count > count and self.policies.slots is not None:
            self.policies.slots.observe((new_seconds - seconds) / (new_count - count))
        duration = now - max(step.started, ended) - (new_seconds - seconds)
        self.policies.cost.observe(step.num_prefill_tokens, step.num_decodes, duration)

    def _finish_reason(self, sequence: Sequence) -> tuple[str | None, int | None]:
        sampling = sequence.request.sampling
        last = sequence.token_ids[-1]
        # A grammar lets an answer end that has no continuation, however short it is.
        long_enough = sequence.num_output_tokens >= sampling.min_tokens or sequence.grammar is not None
        if long_enough and last in sequence.request.stop_token_ids:
            return "stop", last
        if len(sequence.token_ids) >= sequence.max_len:
            return "length", None
        return None, None

    def _drop(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.ended = True
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        self.held = [s for s in self.held if not s.ended]
        self.batch.leave(set(sequences))

    def check_integrity(self) -> None:
        """No block is lost, and no sequence is in the batch and in the queue."""
        self.batch.check_integrity()
        assert len({id(s) for s in self.sequences}) == len(self.running) + len(self.waiting) + len(self.held)
