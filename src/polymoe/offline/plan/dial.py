"""What other budgets would buy: fidelity against bytes, from the options that a plan chooses among."""

from __future__ import annotations

import numpy as np

from polymoe.bundle.manifest import DialPoint
from polymoe.offline.plan.knapsack import Choices
from polymoe.offline.plan.quantisation_error import FloatArray

_POINTS = 12


def dial(choices: Choices, top1_per_root_kl: FloatArray, trusted: bool, beside: int = 0) -> tuple[DialPoint, ...]:
    """Points between the fewest bytes and those that lose nothing, by bytes; each has less error than the one before.

    Cheaper than a plan: the variants have equal weights. trusted: as for `Choices.best`. beside: bytes
    of what is not chosen for, which the points have too.
    """
    nothing_lost = np.where(np.isfinite(choices.bytes) & (choices.error.sum(axis=2) == 0), choices.bytes, np.inf)
    most = nothing_lost.min(axis=1).sum()
    if not np.isfinite(most):
        most = choices.most_bytes
    weights = np.full(choices.error.shape[2], 1 / choices.error.shape[2])
    found: list[DialPoint] = []
    for budget in np.geomspace(max(choices.least_bytes, 1), max(most, 1), _POINTS):
        within = max(int(budget), choices.least_bytes)
        chosen = choices.quick(within, weights, trusted)
        num_bytes, error = choices.total(chosen)
        point = DialPoint(
            expert_bytes=num_bytes + beside,
            kl=float(error.mean()),
            top1=float(np.clip(1 - top1_per_root_kl * np.sqrt(error), 0, 1).mean()),
        )
        if not found or (point.expert_bytes > found[-1].expert_bytes and point.kl < found[-1].kl):
            found.append(point)
    return tuple(found)
