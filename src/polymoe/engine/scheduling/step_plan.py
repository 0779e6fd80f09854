"""One step while it is planned: what was chosen, and who may still ask for tokens."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from polymoe.engine.policies.fair_share import Flow
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_record import ScheduledSequence
from polymoe.engine.scheduling.waiting_queue import WaitingQueue


@dataclass(frozen=True)
class LaunchedStep:
    """A step that was given to the device, until its tokens are known. The scheduler's own: sequences change."""

    sequences: list[tuple[Sequence, ScheduledSequence]]
    started: float  # time.monotonic()
    num_decodes: int
    num_prefill_tokens: int


@dataclass
class StepPlan:
    """Mutable state of `Scheduler.schedule`."""

    budget: int  # tokens left
    allowed: frozenset[int] | None  # variants that may run; None: all
    chosen: dict[Sequence, int] = field(default_factory=dict)
    preempted: set[Sequence] = field(default_factory=set)
    pressed: bool = False  # a running sequence needed blocks that others held

    def allows(self, sequence: Sequence) -> bool:
        return self.allowed is None or sequence.variant in self.allowed

    def left(self, sequence: Sequence) -> int:
        """Tokens of the sequence that are neither computed nor chosen."""
        return sequence.num_uncomputed - self.chosen.get(sequence, 0)

    def give(self, sequence: Sequence, count: int) -> None:
        self.chosen[sequence] = self.chosen.get(sequence, 0) + count
        self.budget -= count

    def take_back(self, sequence: Sequence) -> int:
        """The sequence was preempted; returns the tokens it had been given."""
        count = self.chosen.pop(sequence, 0)
        self.budget += count
        self.preempted.add(sequence)
        return count


class PrefillQueues:
    """The sequences that want prompt tokens, a queue for each flow; the running ones and the waiting ones together."""

    def __init__(self, plan: StepPlan, running: Iterable[Sequence], waiting: WaitingQueue) -> None:
        """`running` are sorted, the most urgent first."""
        self._plan, self._waiting = plan, waiting
        self.ready: dict[int, dict[str, list[Sequence]]] = {}  # variant -> tenant -> running ones, most urgent last
        self._refused = False  # a flow was dropped that could have gone on
        self.blocked: set[Flow] = set()  # flows whose waiting sequences found no room in the batch or no blocks
        for sequence in running:
            if plan.allows(sequence) and plan.left(sequence) > 0:
                self._of(sequence.flow).insert(0, sequence)
        for flow in waiting.flows():
            if plan.allowed is None or flow[0] in plan.allowed:
                self._of(flow)

    def backlog(self) -> Counter[int]:
        """Tokens that each variant wants."""
        tokens: Counter[int] = Counter()
        for variant, tenants in self.ready.items():
            for tenant, running in tenants.items():
                tokens[variant] += self._waiting.backlog((variant, tenant))[0] + sum(map(self._plan.left, running))
        return tokens

    def heads(self) -> list[Sequence]:
        """The most urgent sequence of each flow, the oldest first."""
        flows = [(variant, tenant) for variant, tenants in self.ready.items() for tenant in tenants]
        return sorted((s for f in flows if (s := self.head(f)) is not None), key=lambda s: s.arrival)

    def head(self, flow: Flow) -> Sequence | None:
        """Whose turn it is in a flow; None if nobody there can go on."""
        running = self._of(flow)
        while running and (running[-1] in self._plan.preempted or self._plan.left(running[-1]) == 0):
            running.pop()
        candidates = running[-1:]
        waiting = None if flow in self.blocked else self._waiting.head(flow)
        if waiting is not None:
            candidates.append(waiting)
        return min(candidates, key=lambda s: s.rank, default=None)

    def started(self, sequence: Sequence) -> None:
        """A waiting sequence runs now; it goes on being the first of its flow."""
        self._of(sequence.flow).append(sequence)

    def idle_flows(self) -> list[Flow]:
        """Those where nobody can go on."""
        flows = [(variant, tenant) for variant, tenants in self.ready.items() for tenant in tenants]
        return [flow for flow in flows if self.head(flow) is None]

    @property
    def contended(self) -> bool:
        """Whether somebody got less than they wanted."""
        return bool(self.ready or self.blocked or self._refused)

    def drop(self, flow: Flow) -> None:
        """Nothing more for this flow in this step."""
        variant, tenant = flow
        self._refused |= self.head(flow) is not None
        del self.ready[variant][tenant]
        if not self.ready[variant]:
            del self.ready[variant]

    def _of(self, flow: Flow) -> list[Sequence]:
        return self.ready.setdefault(flow[0], {}).setdefault(flow[1], [])
