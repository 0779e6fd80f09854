"""The sequences that wait to run: a sorted queue for each (variant, tenant)."""

from bisect import bisect_left, insort
from collections.abc import Iterator, KeysView

from polymoe.engine.policies.fair_share import Flow
from polymoe.engine.scheduling.sequence import Rank, Sequence


class WaitingQueue:
    """Most urgent first within a flow: priority, deadline, arrival (`Sequence.rank`)."""

    def __init__(self) -> None:
        self._flows: dict[Flow, list[tuple[Rank, Sequence]]] = {}
        self._rank: dict[Sequence, Rank] = {}  # the rank that a sequence was filed under
        self._tokens: dict[Flow, int] = {}  # to compute, of each flow

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._rank

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._rank)

    def flows(self) -> KeysView[Flow]:
        return self._flows.keys()

    def add(self, sequence: Sequence) -> None:
        rank, flow = sequence.rank, sequence.flow
        insort(self._flows.setdefault(flow, []), (rank, sequence))
        self._rank[sequence] = rank
        self._tokens[flow] = self._tokens.get(flow, 0) + sequence.num_uncomputed

    def remove(self, sequence: Sequence) -> None:
        """Before its progress changes."""
        rank, flow = self._rank.pop(sequence), sequence.flow
        queue = self._flows[flow]
        del queue[bisect_left(queue, (rank, sequence))]
        self._tokens[flow] -= sequence.num_uncomputed
        if not queue:
            del self._flows[flow], self._tokens[flow]

    def head(self, flow: Flow) -> Sequence | None:
        """The most urgent sequence of a flow."""
        queue = self._flows.get(flow)
        return queue[0][1] if queue else None

    def count(self, variant: int) -> int:
        return sum(len(queue) for (v, _), queue in self._flows.items() if v == variant)

    def backlog(self, flow: Flow) -> tuple[int, int]:
        """Tokens and sequences that wait in a flow."""
        return self._tokens.get(flow, 0), len(self._flows.get(flow, ()))

    def ahead_of(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens and sequences of its own flow that come before a sequence which is not in the queue."""
        queue = self._flows.get(sequence.flow, [])
        before = queue[: bisect_left(queue, (sequence.rank, sequence))]
        return sum(other.num_uncomputed for _, other in before), len(before)
