"""What a new request would find: the work that comes before it under fair sharing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polymoe.engine.fair_share import Flow
from polymoe.engine.places import Places
from polymoe.engine.sequence import Sequence
from polymoe.engine.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from polymoe.engine.policies import Policies


@dataclass(frozen=True)
class Backlog:
    """What one flow has to compute before it has nothing more to wait for."""

    tokens: float
    sequences: float
    weight: float

    def while_serving(self, own: float, weight: float) -> float:
        """The part of this flow (0 to 1) that fair sharing serves while `own` tokens of a flow of `weight` are."""
        return min(1.0, own * self.weight / weight / self.tokens) if self.tokens > 0 else 0.0


@dataclass(frozen=True)
class Outlook:
    """The engine as a new request finds it.

    Args:
        own: what comes before it in its own flow, itself included, and the flow's weight.
        others: the other flows.
        decodes: sequences that decode now.
        step_tokens: prompt tokens that one step takes.
        places: in the batch, that are free or that the request's variant is entitled to.
        switch: seconds until its variant has a slot.
    """

    own: Backlog
    others: Iterable[Backlog]
    decodes: int
    step_tokens: int
    places: float
    switch: float = 0.0


def look_out(
    sequence: Sequence,
    policies: "Policies",
    places: Places,
    waiting: WaitingQueue,
    max_num_batched_tokens: int,
    now: float,
) -> Outlook:
    """The engine as `sequence`, which has not been added yet, finds it."""
    running = places.running
    decodes = sum(s.num_uncomputed == 1 for s in running)
    prefilling: Counter[Flow] = Counter()
    for other in running:
        prefilling[other.flow] += other.num_uncomputed if other.num_uncomputed > 1 else 0
    flows = set(prefilling) | set(waiting.flows()) | {sequence.flow}
    tenants = Counter(variant for variant, _ in flows)

    def backlog(flow: Flow, tokens: int, sequences: int) -> Backlog:
        return Backlog(tokens + prefilling[flow], sequences, policies.fair.weights[flow[0]] / tenants[flow[0]])

    before, count = waiting.ahead_of(sequence)
    own = before + sequence.num_uncomputed - places.num_cached(sequence)
    return Outlook(
        own=backlog(sequence.flow, own, count + 1),
        others=[backlog(flow, *waiting.backlog(flow)) for flow in flows - {sequence.flow}],
        decodes=decodes,
        step_tokens=policies.budget.prefill_tokens(decodes, max_num_batched_tokens - decodes),
        places=places.available(sequence.variant),
        switch=0.0 if policies.slots is None else policies.slots.wait(now, sequence.variant),
    )
