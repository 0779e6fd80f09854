"""Whether a request is taken: by the length of the queue, and by the time to first token that it would see."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from polymoe.engine.policies.step_cost import StepCost
from polymoe.errors import OverloadedError

_SMOOTHING = 0.02  # part of the newest interval between two ends of sequences


def has_room(limit: int, total: int, own: int, share: float) -> bool:
    """Whether one more fits into a queue of `limit`. Beyond it a variant may still fill its own `share` (0 to 1) of
    the limit, so that the queue of one variant never shuts the others out; the queue stays below twice the limit.

    Args:
        total: entries in the queue, `own` of them of the variant that asks.
    """
    return total < limit or own < math.floor(limit * share)


@dataclass(frozen=True)
class Backlog:
    """What one flow has to compute before it has nothing more to wait for."""

    tokens: float
    sequences: float
    share: float  # of the flow, in relation to the others'

    def while_serving(self, own: float, share: float) -> float:
        """The part of this flow (0 to 1) that fair sharing serves while `own` tokens of a flow with `share` are."""
        return min(1.0, own * self.share / share / self.tokens) if self.tokens > 0 else 0.0


@dataclass(frozen=True)
class LoadEstimate:
    """The work that a new request finds in the engine.

    Args:
        own: what comes before it in its own flow, itself included, and the flow's share.
        others: the other flows.
        decodes: sequences that decode now.
        step_tokens: prompt tokens that one step takes.
        room: sequences that the running batch takes, or that the request's variant is entitled to.
        switch: seconds until its variant has a slot.
    """

    own: Backlog
    others: Iterable[Backlog]
    decodes: int
    step_tokens: int
    room: float
    switch: float = 0.0


class AdmissionControl:
    """Predicts times to first token and refuses what would be too late.

    Args:
        factor: a request is refused when the prediction exceeds this many times its target. None: never.
        clock: seconds.
    """

    def __init__(self, cost: StepCost, factor: float | None, clock: Callable[[], float]) -> None:
        self._cost, self._factor, self._clock = cost, factor, clock
        self._last_end = clock()
        self._interval = 0.0  # seconds between two ends of sequences while there is work

    def started(self) -> None:
        """The engine was idle until now: the pause says nothing about how fast sequences end."""
        self._last_end = self._clock()

    def ended(self, count: int) -> None:
        """`count` sequences have just ended and left the running batch."""
        now = self._clock()
        sample = (now - self._last_end) / count
        newest = 1 - (1 - _SMOOTHING) ** count
        self._interval += (newest if self._interval > 0 else 1.0) * (sample - self._interval)
        self._last_end = now

    def predict(self, estimate: LoadEstimate) -> float:
        """Seconds to the first token under fair sharing: everything of its own flow that comes before it, and of each
        other flow as much as that one is served meanwhile; and the time until enough sequences have
        left the running batch."""
        own = estimate.own
        tokens, sequences = own.tokens, own.sequences
        for other in estimate.others:
            part = other.while_serving(own.tokens, own.share)
            tokens += part * other.tokens
            sequences += part * other.sequences
        prefill = self._cost.prefill_seconds(tokens, estimate.decodes, estimate.step_tokens)
        queueing = max(0.0, sequences - estimate.room) * self._interval
        return max(prefill, queueing) + estimate.switch

    def check(self, target: float | None, estimate: Callable[[], LoadEstimate]) -> None:
        """Raises `OverloadedError` for a request with a target (seconds) that it would miss by too much."""
        if target is None or self._factor is None or not self._cost.ready:
            return
        limit, predicted = self._factor * target, self.predict(estimate())
        if predicted > limit:
            raise OverloadedError(
                f"The first token would take about {predicted:.1f} s, which is too long for the request's SLO class "
                f"({target:g} s); try again later or use a slower class.",
                retry_after=max(1.0, predicted - limit),
            )
