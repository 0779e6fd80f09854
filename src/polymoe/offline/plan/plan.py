"""Which expert serves whom, how it is stored, and what of it fits on the device. Pure arithmetic, no files.

Letters: V variants, L layers with routed experts, E experts a layer. A position is (layer, expert). Two variants whose
experts at a position are bit-identical have one expert there, which the lowest of them names (`same_as`); sharing it
is free and happens in every policy.

A *base* is a stored expert that one or more variants build on, a *delta* a correction of one variant against the base
as stored: variant v's expert at (l, e) is decode(base) + sign · decode(delta).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from polymoe.bundle.manifest import DialPoint
from polymoe.errors import PlanError
from polymoe.offline.plan.correction import NO_DELTA, correction
from polymoe.quant import formats

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
StrArray = NDArray[np.object_]
STORED = formats.STORED.name
MERGES = ("own", "mean", "regmean")


def _distinct(serving: IntArray) -> IntArray:
    """The `same_as` [V, L, E] of a family where no two experts are identical."""
    return np.broadcast_to(np.arange(len(serving))[:, None, None], serving.shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """For each position and variant: which base serves it, in what format, and with what correction.

    serving: int [V, L, E], the variant that names v's base at (l, e). Equal `serving` at one position is one base:
        that variant's own expert (merge "own"), or the merge of all variants that it serves.
    resident: bool [V, L, E], the base is on the device; otherwise it is fetched from the host tier when routed to.
        The host tier holds experts as the checkpoints store them.
    memory: the budget as it was asked for; "" for the policy's default.
    base: str [L, E], format of the position's resident bases.
    merge: str [L, E], "own", "mean" or "regmean".
    delta: str [L, E], the position's `Correction`.
    delta_owner: int [V, L, E], the variant whose delta v uses, −1 for none. Default: everyone has an own one, but not
        where it is zero (the owner of a base stored as it is).
    predicted_error: float [V], nats a token; None when it was not predicted.
    position_error: float [L, E], its parts, mean of the variants; dial: what other budgets would buy. Likewise.
    nonexperts: name -> (format of the bases, format of the deltas): how matrices beside the experts are packed, each
        version by itself (`NO_DELTA`) or all on one base. What is not named is as the checkpoints store it.

    The fields [L, E] may be given as anything that broadcasts to that shape.
    """

    policy: str
    serving: IntArray
    resident: BoolArray
    memory: str = ""
    base: StrArray = STORED  # type: ignore[assignment]
    merge: StrArray = "own"  # type: ignore[assignment]
    delta: StrArray = NO_DELTA  # type: ignore[assignment]
    delta_owner: IntArray = None  # type: ignore[assignment]
    predicted_error: NDArray[np.float64] | None = None
    position_error: NDArray[np.float64] | None = None
    dial: tuple[DialPoint, ...] = ()
    dial_of_all: bool = False  # its bytes are those of all weights
    nonexperts: Mapping[str, tuple[str, str]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("base", "merge", "delta"):
            value = np.asarray(getattr(self, name), dtype=object)
            object.__setattr__(self, name, np.broadcast_to(value, self.serving.shape[1:]))
        if self.delta_owner is None:
            object.__setattr__(self, "delta_owner", self._deltas(_distinct(self.serving)))

    def _deltas(self, same_as: IntArray) -> IntArray:
        """`delta_owner` [V, L, E]: one delta for identical experts on one base, none where it would be zero."""
        together = self.serving[:, None] == self.serving[None]  # [V, V, L, E]
        alike = same_as[:, None] == same_as[None]
        alone = (~together | alike).all(axis=1)  # everyone on v's base is identical to v
        is_base = alone | ((self.merge == "own") & (same_as == np.take_along_axis(same_as, self.serving, axis=0)))
        lowest = (together & alike).argmax(axis=1)  # the lowest variant on v's base that is identical to v
        owner = np.where(self.plus_minus, self.serving, lowest)
        none = (self.delta == NO_DELTA) | ~self.resident | ((self.base == STORED) & is_base)
        return np.where(none, -1, owner)

    def with_shared_deltas(self, same_as: IntArray) -> Self:
        """The same plan with one delta for variants whose experts are identical. `same_as` as in the module."""
        return replace(self, delta_owner=self._deltas(same_as))

    @property
    def plus_minus(self) -> BoolArray:
        """bool [L, E]: two variants share one delta with opposite signs."""
        mirrored = [(found := correction(str(name))) is not None and found.mirrored for name in self.delta.flat]
        return np.array(mirrored, dtype=np.bool_).reshape(self.delta.shape)

    @property
    def sign(self) -> NDArray[np.int8]:
        """int8 [V, L, E]: −1 for the second variant of a ± position, else 1."""
        second = self.plus_minus & (self.delta_owner >= 0) & (self.delta_owner != _distinct(self.serving))
        return np.where(second, -1, 1).astype(np.int8)

    def delta_format(self, layer: int, expert: int) -> str:
        """The format of a position's deltas, "none" for none."""
        found = correction(str(self.delta[layer, expert]))
        return NO_DELTA if found is None else found.fmt.name

    def is_verbatim(self, layer: int, expert: int) -> bool:
        """The position's bases are experts as the checkpoints store them."""
        return bool(self.base[layer, expert] == STORED and self.merge[layer, expert] == "own")

    def check_integrity(self) -> None:
        """Assert that a base is either resident for all its users or for none, and that deltas match their bases."""
        variants = range(len(self.serving))
        assert self.serving.shape == self.resident.shape == self.delta_owner.shape
        assert np.isin(self.merge.astype(str), MERGES).all(), "unknown merge"
        for v in variants:
            for w in range(v):
                same = self.serving[v] == self.serving[w]
                assert bool((self.resident[v] == self.resident[w])[same].all()), f"variants {v} and {w} disagree"
        has_delta = self.delta_owner >= 0
        assert not bool((has_delta & ~(self.resident & (self.delta != NO_DELTA))).any()), "a delta on nothing"
        owners_base = np.take_along_axis(self.serving, np.maximum(self.delta_owner, 0), axis=0)
        assert bool((owners_base == self.serving)[has_delta].all()), "a delta against another base"
        pairs = (self.sign[:, None] * self.sign[None] < 0) & (self.serving[:, None] == self.serving[None])
        assert bool((pairs.sum(axis=(0, 1)) <= 2)[self.plus_minus].all()), "± is for two variants"

    def position_counts(self) -> dict[str, int]:
        """Positions `shared` (one resident base for all), `separate` (several) and `absent` (any from the host)."""
        on_device = self.resident.all(axis=0)
        one = (self.serving == self.serving[0]).all(axis=0)
        shared, separate = int((on_device & one).sum()), int((on_device & ~one).sum())
        return {"shared": shared, "separate": separate, "absent": int((~on_device).sum())}


def round_robin_layout(distance: Any, num_variants: int, capacity: int) -> IntArray:
    """The initial expert loader, Algorithm 1 of arXiv 2505.06481.

    `distance` [L, E] (array, tensor or nested lists): how far the variants' experts are apart at each position.
    All positions of all layers are sorted together by distance, ascending and stable (ties keep layer-major order);
    the i-th takes the expert of variant i mod `num_variants` until `capacity` experts are placed.
    Returns int [L, E], the owner, −1 where the expert is absent. Raises `PlanError` for inputs out of range.
    """
    if num_variants < 1:
        raise PlanError(f"num_variants must be at least 1, got {num_variants}.")
    if capacity < 0:
        raise PlanError(f"capacity must not be negative, got {capacity}.")
    values = _checked_distance(distance)
    order = np.argsort(values.reshape(-1), kind="stable")[:capacity]
    owner = np.full(values.size, -1, dtype=np.int64)
    owner[order] = np.arange(len(order)) % num_variants
    return owner.reshape(values.shape)


def _checked_distance(distance: Any) -> NDArray[np.float64]:
    try:
        if hasattr(distance, "detach"):  # a tensor, perhaps bfloat16, which numpy does not have
            distance = distance.detach().cpu().double()
        values = np.asarray(distance, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PlanError(f"distance must be numbers of shape [L, E]: {error}") from error
    if values.ndim != 2:
        raise PlanError(f"distance must have shape [L, E], got {list(values.shape)}.")
    if not np.isfinite(values).all():
        raise PlanError("distance has values that are not finite; do the checkpoints contain NaN or infinity?")
    return values


def paper_plan(distance: Any, same_as: IntArray, capacity: int, memory: str = "") -> Plan:
    """The paper's plan for `capacity` experts on the device.

    `same_as` int [V, L, E]: lowest variant with the identical expert. Up to L·E experts this is Algorithm 1; an absent
    position is served by each variant's own expert from the host tier. Spare capacity beyond L·E, which the paper does
    not have, makes positions separate (every variant its own expert), the largest distance first, while it fits.
    """
    values = _checked_distance(distance)
    num_variants, num_layers, num_experts = same_as.shape
    if values.shape != (num_layers, num_experts):
        raise PlanError(f"distance {list(values.shape)} and same_as {list(same_as.shape)} do not match.")
    owner = round_robin_layout(values, num_variants, capacity)
    owned = np.take_along_axis(same_as, np.maximum(owner, 0)[None], axis=0)
    serving = np.where(owner >= 0, owned, same_as)
    resident = np.broadcast_to(owner >= 0, same_as.shape).copy()

    spare = capacity - values.size
    for flat in np.argsort(-values.reshape(-1), kind="stable"):
        layer, expert = divmod(int(flat), num_experts)
        extra = len(np.unique(same_as[:, layer, expert])) - 1
        if extra > spare:
            break
        spare -= extra
        serving[:, layer, expert] = same_as[:, layer, expert]
    return Plan("paper", serving, resident, memory)


def separate_plan(same_as: IntArray, capacity: int | None = None, memory: str = "") -> Plan:
    """Lossless: every variant is served by its own expert everywhere. `same_as` int [V, L, E].

    With a `capacity` (experts) too small for all, those that most variants use come first, then one variant's expert 0
    in every layer, the next variant's expert 0, …, expert 1, …, so that no layer and no variant is left behind. The
    rest is in the host tier.
    """
    num_variants, num_layers, num_experts = same_as.shape
    users: dict[tuple[int, int, int], int] = {}
    for layer in range(num_layers):
        for expert in range(num_experts):
            for owner in same_as[:, layer, expert].tolist():
                users[layer, expert, owner] = users.get((layer, expert, owner), 0) + 1

    def spread(key: tuple[int, int, int]) -> tuple[int, ...]:
        layer, expert, owner = key
        return -users[key], expert, (owner - layer) % num_variants, layer

    resident = np.zeros(same_as.shape, dtype=np.bool_)
    order = sorted(users, key=spread)
    for layer, expert, owner in order if capacity is None else order[:capacity]:
        resident[:, layer, expert] |= same_as[:, layer, expert] == owner
    return Plan("separate", same_as.copy(), resident, memory)
