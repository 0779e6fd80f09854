"""Who may have the next tokens, places and blocks: weighted shares of variants, equal shares of their tenants.

Tokens are divided by deficit round robin twice: over the variants, and within a variant over its tenants. Places in the
batch and KV blocks, which are held for long, are divided by entitlement: anybody may hold idle ones, but a newcomer of
a variant below its share may take them back from a variant that is clearly above its own.
"""

import math
from collections.abc import Mapping, Sequence

from polymoe.engine.deficit_round_robin import MAX_DEBT, DeficitRoundRobin

Flow = tuple[int, str]  # (variant, tenant)

# Holding this many times one's share is not yet too much: without slack, variants that are equally busy would take
# places from each other all the time, and each time work is lost.
_SLACK = 1.25


class FairShare:
    """Shares of V variants.

    Args:
        weights: [V], each more than 0.
        quantum: tokens that a variant of weight 1 may take in a turn.
    """

    def __init__(self, weights: Sequence[float], quantum: int) -> None:
        assert quantum > 0
        assert all(weight > 0 for weight in weights)
        self.weights, self.quantum = list(weights), quantum
        self._variants: DeficitRoundRobin[int] = DeficitRoundRobin(lambda variant: quantum * self.weights[variant])
        self._tenants: dict[int, DeficitRoundRobin[str]] = {}

    def enter(self, flow: Flow) -> None:
        """The flow has tokens to compute. Idempotent."""
        variant, tenant = flow
        self._variants.enter(variant)
        self._of(variant).enter(tenant)

    def turn(self, ready: Mapping[int, Mapping[str, object]]) -> tuple[Flow, int]:
        """Whose turn it is among the flows that have entered (variant -> tenant -> anything), and for how many tokens.
        The turn lasts until these tokens are charged."""
        variant = self._variants.turn(ready)
        tenants = self._of(variant)
        tenant = tenants.turn(ready[variant])
        return (variant, tenant), math.ceil(min(self._variants.credit(variant), tenants.credit(tenant)))

    def charge(self, flow: Flow, tokens: int) -> None:
        """The flow took tokens; negative: it gave them back."""
        variant, tenant = flow
        self._variants.charge(variant, tokens)
        self._of(variant).charge(tenant, tokens)

    def may_overdraw(self, flow: Flow) -> bool:
        """Whether the flow may jump the round robin once more: its debts are less than half of the limit."""
        variant, tenant = flow
        floor = -MAX_DEBT / 2 * self.quantum
        return (
            self._variants.credit(variant) > floor * self.weights[variant]
            and self._of(variant).credit(tenant) > floor * self.weights[variant]
        )

    def settle(self, contended: bool) -> None:
        """The step is planned; `contended`: somebody got less than they wanted."""
        if not contended:
            self._variants.clear()
            self._tenants.clear()

    def share(self, variant: int, active: set[int], capacity: float) -> float:
        """The part of `capacity` that `variant` is entitled to while `active` variants want some."""
        return capacity * self.weights[variant] / sum(self.weights[v] for v in active | {variant})

    def furthest_over(self, held: Mapping[int, int], active: set[int], capacity: int) -> int | None:
        """The variant that holds the most for its share, if that is clearly too much."""
        if len(active) < 2 or not held:
            return None
        excess, variant = max((count / self.share(v, active, capacity), v) for v, count in held.items())
        return variant if excess > _SLACK else None

    def _of(self, variant: int) -> DeficitRoundRobin[str]:
        if variant not in self._tenants:
            quantum = self.quantum * self.weights[variant]
            self._tenants[variant] = DeficitRoundRobin(lambda _: quantum)
        return self._tenants[variant]
