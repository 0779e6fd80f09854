"""How many prompt tokens a step may take so that the sequences beside them get their next token in time.

Chunked prefill (Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024)
with a chunk size that follows from a target for the inter-token latency and the measured cost of a step, instead of a
fixed one.
"""

from polymoe.engine.policies.step_cost import StepCost

# Prompts always get this many tokens, or a target that cannot be met would stop them for ever.
MIN_PREFILL = 16
# While steps of a size were never measured, the next may be this many times the largest that was.
_GROWTH = 2
# Prompts of variants that had more than their share make a step at most this many times as long as its decodes do:
# whoever arrives now waits for the end of the step. A full batch hardly loses by it.
_COURTESY = 1.5


class StepBudget:
    """Limits prefill.

    Args:
        target_itl: seconds that a step with decodes may take. None: no limit.
    """

    def __init__(self, cost: StepCost, target_itl: float | None) -> None:
        self._cost, self._target = cost, target_itl

    def prefill_tokens(self, decodes: int, room: int) -> int:
        """Prompt tokens for a step that also decodes `decodes` sequences; at most `room`, the rest of its tokens."""
        if self._target is None or decodes == 0:
            return room
        tokens = float(MIN_PREFILL)
        if self._cost.ready:
            largest = max(_GROWTH * self._cost.largest_prefill, MIN_PREFILL)
            tokens = max(MIN_PREFILL, min(self._cost.prefill_within(self._target, decodes), largest))
        return int(min(room, tokens))

    def courtesy_tokens(self, decodes: int, room: int) -> int:
        """Prompt tokens of a step for a variant that had more than its share, while others are there."""
        if not self._cost.ready:
            return room
        within = self._cost.prefill_within(_COURTESY * self._cost.seconds(0, decodes), decodes)
        return int(min(room, max(MIN_PREFILL, within)))
