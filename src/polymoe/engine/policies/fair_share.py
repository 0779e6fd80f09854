"""Who may have the next tokens, room in the batch and blocks: configured shares of variants, and of their tenants.

Tokens are divided by deficit round robin twice: over the variants, and within a variant over its tenants. Room in the
batch and KV blocks, which are held for long, are divided by entitlement: anybody may hold idle ones, but a newcomer of
a variant below its share may take them back from a variant that is clearly above its own. A share is larger for a
variant that used less than its part of the tokens lately and smaller for one that used more, so that a burst of the one
passes before the steady flood of the other.
"""

import math
from collections.abc import Mapping, Sequence, Set

from polymoe.engine.policies.deficit_round_robin import MAX_DEBT, DeficitRoundRobin

Flow = tuple[int, str]  # (variant, tenant)

# Holding this many times one's share is not yet too much: without slack, variants that are equally busy would take
# room from each other all the time, and each time work is lost.
_SLACK = 1.25
# A variant that used x times its share of the tokens may hold x^-_STEEPNESS of its share of the batch, within limits.
# Chosen by the simulation of a flood: less steep, others wait longer near saturation; steeper, nothing is gained.
_STEEPNESS = 3
_BURST = 3.0
_MEMORY = 500  # quanta after which a token that was used counts 1/e


class FairShare:
    """Divides among V variants. Only the `active` ones, those that want something now, have a share.

    Args:
        shares: [V], each more than 0, in relation to each other.
        quantum: tokens that a variant of share 1 may take in a turn.
    """

    def __init__(self, shares: Sequence[float], quantum: int) -> None:
        assert quantum > 0
        assert all(share > 0 for share in shares)
        self.shares, self.quantum = list(shares), quantum
        self._variants: DeficitRoundRobin[int] = DeficitRoundRobin(lambda variant: quantum * self.shares[variant])
        self._tenants: dict[int, DeficitRoundRobin[str]] = {}
        self._weights: dict[str, float] = {}  # of tenants; 1 where nothing is said
        self._used = [0.0] * len(shares)  # tokens of each variant, fading
        self._in_step = [0] * len(shares)  # the same, of the step that is being planned

    def enter(self, flow: Flow) -> None:
        """The flow has tokens to compute. Idempotent."""
        variant, tenant = flow
        self._variants.enter(variant)
        self._of(variant).enter(tenant)

    def weigh(self, tenant: str, weight: float) -> None:
        """From now on the tenant has this weight among the tenants of a variant."""
        if weight != self._weights.get(tenant, 1.0):
            self._weights[tenant] = weight

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
        self._in_step[variant] += tokens

    def may_overdraw(self, flow: Flow) -> bool:
        """Whether the flow may jump the round robin once more: its debts are less than half of the limit."""
        variant, tenant = flow
        floor = -MAX_DEBT / 2 * self.quantum * self.shares[variant]
        return self._variants.credit(variant) > floor and self._of(variant).credit(tenant) > floor

    def settle(self, active: Set[int], contended: bool) -> None:
        """The step is planned; `contended`: somebody got less than they wanted."""
        if len(active) > 1:  # what one uses while nobody else is there is free
            fading = math.exp(-sum(self._in_step) / (_MEMORY * self.quantum))
            self._used = [fading * used + new for used, new in zip(self._used, self._in_step, strict=True)]
        self._in_step = [0] * len(self.shares)
        if not contended:
            self._variants.clear()
            self._tenants.clear()

    def share(self, variant: int, active: Set[int], capacity: float) -> float:
        """The part of `capacity` that is `variant`'s by its share alone."""
        return capacity * self.shares[variant] / sum(self.shares[v] for v in active | {variant})

    def usage(self, variant: int, active: Set[int]) -> float:
        """Tokens that the variant used lately, as a multiple of its share."""
        total = sum(self._used)
        return self._used[variant] / self.share(variant, active, total) if total > 0 else 1.0

    def is_greedy(self, variant: int, active: Set[int]) -> bool:
        """Whether the variant used clearly more than its share lately; never while it is alone."""
        return self.usage(variant, active) > _SLACK

    def entitlement(self, variant: int, active: Set[int], capacity: float) -> float:
        """How much of a `capacity` that is held for long the variant may claim."""
        used = max(self.usage(variant, active), 1.0 / _BURST)
        share = self.share(variant, active, capacity)
        return share * min(_BURST if share >= 1 else 1.0, max(1.0 / _BURST, used**-_STEEPNESS))

    def furthest_over(self, held: Mapping[int, int], active: Set[int], capacity: int) -> int | None:
        """The variant that holds most in relation to its entitlement, if that is clearly too much."""
        if len(active) < 2 or not held:
            return None
        excess, variant = max((count / self.entitlement(v, active, capacity), v) for v, count in held.items())
        return variant if excess > _SLACK else None

    def largest_tenant(self, held: Mapping[str, int], tenants: Set[str], newcomer: str, needed: int) -> str | None:
        """The tenant of a variant that makes room for `needed` more of another, so that the variant holds no more
        than before: the one that holds most for its weight, if that is clearly too much, and the newcomer less than its
        part."""
        # What a tenant of weight 1 would hold.
        part = sum(held.values()) / sum(self._weight(t) for t in tenants | {newcomer})
        most, tenant = max(((count / self._weight(t), t) for t, count in held.items()), default=(0.0, ""))
        fits = held.get(newcomer, 0) + needed <= part * self._weight(newcomer)
        return tenant if fits and most > _SLACK * part and tenant != newcomer else None

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _of(self, variant: int) -> DeficitRoundRobin[str]:
        if variant not in self._tenants:
            quantum = self.quantum * self.shares[variant]
            self._tenants[variant] = DeficitRoundRobin(lambda tenant: quantum * self._weight(tenant))
        return self._tenants[variant]
