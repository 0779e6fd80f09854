"""The decisions that the scheduler leaves to others, and how they are made from the options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polymoe.engine.policies.admission import AdmissionControl
from polymoe.engine.policies.fair_share import FairShare
from polymoe.engine.policies.slot_policy import SlotPolicy
from polymoe.engine.policies.step_budget import StepBudget
from polymoe.engine.policies.step_cost import StepCost

# A turn of the round robin in parts of a full step: short enough that everybody has one in most steps, long enough
# that most prompts are not cut.
_TURNS_PER_STEP = 8


@dataclass(frozen=True)
class Policies:
    """One of each; none of them knows the others, but for the cost model that they read."""

    fair: FairShare
    slots: SlotPolicy | None  # which variants are loaded; None: all of them, always
    mix: SlotPolicy | None  # which of those run in a step; None: all of them
    cost: StepCost
    budget: StepBudget
    admission: AdmissionControl

    @classmethod
    def of(
        cls,
        shares: Sequence[float],
        *,
        num_slots: int,
        max_variants_per_step: int | None = None,
        max_num_batched_tokens: int,
        target_itl: float | None = None,
        admission_factor: float | None = None,
        clock: Callable[[], float],
    ) -> "Policies":
        """Args:
        shares: [V] of the variants, in relation to each other.
        target_itl: seconds that a step with decodes may take.
        admission_factor: predicted time to first token that is refused, in multiples of a request's target.
        """
        cost = StepCost()
        num_slots = min(num_slots, len(shares))
        mixed = min(max_variants_per_step or num_slots, num_slots)
        return cls(
            fair=FairShare(shares, max(1, max_num_batched_tokens // _TURNS_PER_STEP)),
            slots=SlotPolicy(num_slots, range(num_slots)) if num_slots < len(shares) else None,
            mix=SlotPolicy(mixed, range(mixed)) if mixed < num_slots else None,
            cost=cost,
            budget=StepBudget(cost, target_itl),
            admission=AdmissionControl(cost, admission_factor, clock),
        )
