"""Which expert serves whom, and what of it fits on the device. Pure arithmetic, no files.

Letters: V variants, L layers with routed experts, E experts a layer. A position is (layer, expert). Two variants whose
experts at a position are bit-identical share one *version* there, named by the lowest such variant; sharing it is free
and happens in every policy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymoe.errors import PlanError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
POLICIES = ("paper", "separate")


@dataclass(frozen=True, eq=False)
class Plan:
    """`serving` int [V, L, E]: the variant whose expert version serves variant v at (l, e).

    `resident` bool [V, L, E]: that expert is on the device; otherwise it is fetched from the host tier when routed to.
    Equal `serving` at one position is one physical expert.
    """

    policy: str
    serving: IntArray
    resident: BoolArray
    memory: str = ""  # the budget as it was asked for; "" for the policy's default

    def check_integrity(self) -> None:
        """Assert that an expert version is either resident for all its users or for none."""
        assert self.serving.shape == self.resident.shape
        for v in range(len(self.serving)):
            for w in range(v):
                same = self.serving[v] == self.serving[w]
                assert bool((self.resident[v] == self.resident[w])[same].all()), f"variants {v} and {w} disagree"

    def position_counts(self) -> dict[str, int]:
        """Positions `shared` (one resident expert for all), `separate` (several) and `absent` (any from the host)."""
        on_device = self.resident.all(axis=0)
        one = (self.serving == self.serving[0]).all(axis=0)
        shared, separate = int((on_device & one).sum()), int((on_device & ~one).sum())
        return {"shared": shared, "separate": separate, "absent": int((~on_device).sum())}


@dataclass(frozen=True, eq=False)
class PhysicalLayout:
    """Where each expert lies. `table` int32 [V, L, E]: p >= 0 is index p of the layer's resident stack, −1 − h is index
    h of its host list. `resident[l]` and `host[l]` list the (variant, expert) stored there, by expert, then variant."""

    table: NDArray[np.int32]
    resident: tuple[tuple[tuple[int, int], ...], ...]
    host: tuple[tuple[tuple[int, int], ...], ...]


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


def paper_plan(distance: Any, version: IntArray, capacity: int, memory: str = "") -> Plan:
    """The paper's plan for `capacity` experts on the device.

    `version` int [V, L, E]: lowest variant with the identical expert. Up to L·E experts this is Algorithm 1; an absent
    position is served by each variant's own expert from the host tier. Spare capacity beyond L·E, which the paper does
    not have, makes positions separate (every variant its own expert), the largest distance first, while it fits.
    """
    values = _checked_distance(distance)
    num_variants, num_layers, num_experts = version.shape
    if values.shape != (num_layers, num_experts):
        raise PlanError(f"distance {list(values.shape)} and version {list(version.shape)} do not match.")
    owner = round_robin_layout(values, num_variants, capacity)
    owned = np.take_along_axis(version, np.maximum(owner, 0)[None], axis=0)
    serving = np.where(owner >= 0, owned, version)
    resident = np.broadcast_to(owner >= 0, version.shape).copy()

    spare = capacity - values.size
    for flat in np.argsort(-values.reshape(-1), kind="stable"):
        layer, expert = divmod(int(flat), num_experts)
        extra = len(np.unique(version[:, layer, expert])) - 1
        if extra > spare:
            break
        spare -= extra
        serving[:, layer, expert] = version[:, layer, expert]
    return Plan("paper", serving, resident, memory)


def separate_plan(version: IntArray, capacity: int | None = None, memory: str = "") -> Plan:
    """Lossless: every variant is served by its own expert everywhere. `version` int [V, L, E].

    With a `capacity` (experts) too small for all, those that most variants use come first, then one variant's expert 0
    in every layer, the next variant's expert 0, …, expert 1, …, so that no layer and no variant is left behind. The
    rest is in the host tier.
    """
    num_variants, num_layers, num_experts = version.shape
    users: dict[tuple[int, int, int], int] = {}
    for layer in range(num_layers):
        for expert in range(num_experts):
            for owner in version[:, layer, expert].tolist():
                users[layer, expert, owner] = users.get((layer, expert, owner), 0) + 1

    def spread(key: tuple[int, int, int]) -> tuple[int, ...]:
        layer, expert, owner = key
        return -users[key], expert, (owner - layer) % num_variants, layer

    resident = np.zeros(version.shape, dtype=np.bool_)
    order = sorted(users, key=spread)
    for layer, expert, owner in order if capacity is None else order[:capacity]:
        resident[:, layer, expert] |= version[:, layer, expert] == owner
    return Plan("separate", version.copy(), resident, memory)


def lay_out(plan: Plan) -> PhysicalLayout:
    """Number the physical experts of each layer."""
    _, num_layers, num_experts = plan.serving.shape
    table = np.zeros(plan.serving.shape, dtype=np.int32)
    resident: list[tuple[tuple[int, int], ...]] = []
    host: list[tuple[tuple[int, int], ...]] = []
    for layer in range(num_layers):
        tiers: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for expert in range(num_experts):
            here, on_device = plan.serving[:, layer, expert], plan.resident[:, layer, expert]
            for owner in _distinct(here.tolist()):
                users = here == owner
                tier = tiers[bool(on_device[users][0])]
                table[users, layer, expert] = len(tier) if tier is tiers[True] else -1 - len(tier)
                tier.append((owner, expert))
        resident.append(tuple(tiers[True]))
        host.append(tuple(tiers[False]))
    return PhysicalLayout(table, tuple(resident), tuple(host))


def table(plan: Plan) -> NDArray[np.int32]:
    """int32 [V, L, E]: >= 0 an index of the layer's resident stack, −1 − h index h of its host list."""
    return lay_out(plan).table


def _distinct(values: Iterable[int]) -> list[int]:
    return sorted(set(values))
