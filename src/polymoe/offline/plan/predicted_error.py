"""The quantisation error that is predicted for a whole plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from polymoe.offline.plan.correction import correction
from polymoe.offline.plan.plan import STORED, Plan
from polymoe.offline.plan.quantisation_error import QuantisationErrors


def predicted_error(plan: Plan, errors: QuantisationErrors) -> NDArray[np.float64] | None:
    """float [V], nats a token; None for plans in which variants are served by another's expert, which is no option of
    the planner, or in groups that `errors` does not know."""
    num_variants, num_layers, num_experts = plan.serving.shape
    total = np.zeros(num_variants)
    for layer, expert in np.ndindex(num_layers, num_experts):
        served, merge = plan.serving[:, layer, expert], plan.merge[layer, expert]
        groups = tuple(tuple(int(v) for v in (served == leader).nonzero()[0]) for leader in np.unique(served))
        known = errors.partitions[layer][expert]
        alone = groups == known[-1]
        found = correction(str(plan.delta[layer, expert]))
        exact = found is not None and found.fmt.is_lossless
        lossless = exact or (alone and plan.base[layer, expert] == STORED)
        if lossless or not plan.resident[:, layer, expert].all():
            continue  # as is what comes from the host
        if groups not in known or (merge == "own" and not alone):
            return None
        base, delta = str(plan.base[layer, expert]), str(plan.delta[layer, expert])
        total += errors.of(layer, expert, known.index(groups), base, delta)
    return total
