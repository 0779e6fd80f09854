"""Plans in which variants share a base at every position: merged, quantised, with deltas, in groups.

A budget is kept as in the paper's policy: positions are placed by distance, the nearest first; what does not fit comes
from the host tier. Spare room makes positions lossless (every variant its own expert as stored), the farthest first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from polymoe.offline.plan.correction import NO_DELTA, Correction
from polymoe.offline.plan.plan import STORED, IntArray, Plan, StrArray
from polymoe.quant.formats import EXACT, get_format


@dataclass(frozen=True, eq=False)
class PositionBytes:
    """What a position costs on the device.

    expert: bytes of one expert as the checkpoints store it.
    base: bytes of one base by format.
    delta: format -> int [V, L, E] (or one number), bytes of each variant's delta.
    """

    expert: int
    base: Callable[[str], int]
    delta: Callable[[str], IntArray | int]

    def of(self, plan: Plan) -> IntArray:
        """int [L, E]: bytes of the plan's resident bases and deltas."""
        _, num_layers, num_experts = plan.serving.shape
        cost = np.zeros((num_layers, num_experts), dtype=np.int64)
        each = {name: self.base(name) for name in set(plan.base.ravel().tolist())}
        deltas = {}
        for layer, expert in np.ndindex(num_layers, num_experts):
            here = plan.resident[:, layer, expert]
            bases = len(np.unique(plan.serving[here, layer, expert]))
            cost[layer, expert] = bases * each[str(plan.base[layer, expert])]
            owners = np.unique(plan.delta_owner[:, layer, expert])
            owners = owners[owners >= 0]
            if len(owners):
                name = plan.delta_format(layer, expert)
                if name not in deltas:
                    deltas[name] = np.broadcast_to(self.delta(name), plan.serving.shape)
                cost[layer, expert] += deltas[name][owners, layer, expert].sum()
        return cost


def delta_format(groups: IntArray, base: str, bits: int) -> StrArray:
    """str [L, E]: "d2" …, and "±d2" for pairs on a base that is not quantised: they lie opposite its midpoint."""
    sizes = (groups[:, None] == groups[None]).sum(axis=1)
    pairs = (sizes == 2).all(axis=0) & (len(groups) == 2) & (base == STORED)
    fmt = get_format(f"d{bits}")
    return np.where(pairs, str(Correction(fmt, mirrored=True)), fmt.name).astype(object)


def shared_plan(
    policy: str,
    groups: IntArray,
    same_as: IntArray,
    base: str,
    merge: str,
    delta: StrArray | str = NO_DELTA,
    memory: str = "",
) -> Plan:
    """Everything resident: one base in format `base` for each group, merged over it, and deltas of format `delta`.

    groups: int [V, L, E], the lowest variant of v's group. same_as: int [V, L, E], the lowest variant with the
    identical expert. A group of identical experts is not merged.
    """
    leaders = np.take_along_axis(same_as, groups, axis=0)
    alike = (same_as == leaders).all(axis=0)
    return Plan(
        policy,
        groups.copy(),
        np.ones(groups.shape, dtype=np.bool_),
        memory,
        base=np.full(groups.shape[1:], base, dtype=object),
        merge=np.where(alike, "own", merge).astype(object),
        delta=np.where(alike & (base == STORED), NO_DELTA, delta).astype(object),
    ).with_shared_deltas(same_as)


def fit(plan: Plan, same_as: IntArray, distance: np.ndarray, cost: PositionBytes, budget: int) -> Plan:
    """Change `plan` (all resident) so that its bases and deltas take at most `budget` bytes, and use what is spare."""
    used = cost.of(plan)
    order = np.argsort(distance.reshape(-1), kind="stable")
    placed = np.zeros(used.size, dtype=np.bool_)
    placed[order] = np.cumsum(used.reshape(-1)[order]) <= budget
    present = placed.reshape(used.shape)

    base, merge, delta = (field.copy() for field in (plan.base, plan.merge, plan.delta))
    serving = np.where(present, plan.serving, same_as)
    spare = budget - int(used[present].sum())
    num_distinct = np.array([[len(np.unique(row)) for row in layer] for layer in np.moveaxis(same_as, 0, -1)])
    for flat in order[::-1] if placed.all() else ():
        layer, expert = divmod(int(flat), used.shape[1])
        extra = int(num_distinct[layer, expert]) * cost.expert - int(used[layer, expert])
        if extra > spare:
            break
        spare -= extra
        serving[:, layer, expert] = same_as[:, layer, expert]
        base[layer, expert], merge[layer, expert], delta[layer, expert] = STORED, "own", NO_DELTA
    resident = np.broadcast_to(present, same_as.shape).copy()
    fitted = Plan(plan.policy, serving, resident, plan.memory, base, merge, delta)
    return fitted.with_shared_deltas(same_as)


def exact_delta_plan(same_as: IntArray, cost: PositionBytes, memory: str = "") -> Plan:
    """Lossless: the lowest variant's expert and an exact delta for each other one, or every variant its own expert
    where that is smaller."""
    together = shared_plan("exact-delta", np.zeros_like(same_as), same_as, STORED, "own", EXACT.name, memory)
    apart = shared_plan("exact-delta", same_as, same_as, STORED, "own", NO_DELTA, memory)
    deltas = cost.of(together) < cost.of(apart)
    return Plan(
        "exact-delta",
        np.where(deltas, together.serving, apart.serving),
        together.resident,
        memory,
        delta=np.where(deltas, together.delta, NO_DELTA).astype(object),
    ).with_shared_deltas(same_as)
