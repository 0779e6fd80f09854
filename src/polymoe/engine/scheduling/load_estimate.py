"""What a new request would find: the work that comes before it under fair sharing."""

from collections import Counter

from polymoe.engine.policies.admission import Backlog, LoadEstimate
from polymoe.engine.policies.fair_share import Flow
from polymoe.engine.policies.policies import Policies
from polymoe.engine.scheduling.running_batch import RunningBatch
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.waiting_queue import WaitingQueue


def estimate_load(
    sequence: Sequence,
    policies: Policies,
    batch: RunningBatch,
    waiting: WaitingQueue,
    max_num_batched_tokens: int,
    now: float,
) -> LoadEstimate:
    """The engine as `sequence`, which has not been added yet, finds it."""
    running = batch.running
    decodes = sum(s.num_uncomputed == 1 for s in running)
    prefilling: Counter[Flow] = Counter()
    for other in running:
        prefilling[other.flow] += other.num_uncomputed if other.num_uncomputed > 1 else 0
    flows = set(prefilling) | set(waiting.flows()) | {sequence.flow}
    tenants = Counter(variant for variant, _ in flows)

    def backlog(flow: Flow, tokens: int, sequences: int) -> Backlog:
        return Backlog(tokens + prefilling[flow], sequences, policies.fair.shares[flow[0]] / tenants[flow[0]])

    before, count = waiting.ahead_of(sequence)
    own = before + sequence.num_uncomputed - batch.num_cached(sequence)
    return LoadEstimate(
        own=backlog(sequence.flow, own, count + 1),
        others=[backlog(flow, *waiting.backlog(flow)) for flow in flows - {sequence.flow}],
        decodes=decodes,
        step_tokens=policies.budget.prefill_tokens(decodes, max_num_batched_tokens - decodes),
        room=batch.room_for(sequence.variant),
        switch=0.0 if policies.slots is None else policies.slots.wait(now, sequence.variant),
    )
