"""Whether variants have a common ancestor: sharing experts between models that do not would ruin both."""

import numpy as np
from numpy.typing import NDArray

from polymoe.console import Console, warn
from polymoe.errors import PlanError
from polymoe.offline.similarity.scan import FamilyScan

# Two unrelated models are about √2 apart, fine-tunes of one model 0.01 to 0.5.
UNRELATED = 1.0
_LOSSLESS = ("separate", "exact-delta")  # policies that serve every variant by its own weights, whatever they are


def related_groups(pair_distance: NDArray[np.float64]) -> list[list[int]]:
    """Variants joined by chains of pairs that are closer than `UNRELATED`; `pair_distance` [V, V]."""
    groups: list[list[int]] = []
    for variant in range(len(pair_distance)):
        near = [group for group in groups if (pair_distance[variant, group] < UNRELATED).any()]
        groups = [group for group in groups if group not in near] + [sorted(sum(near, [variant]))]
    return sorted(groups)


def check_related(scan: FamilyScan, policy: str, accept: bool, console: Console | None) -> None:
    """Raise `PlanError` that shows the distances when the variants plainly have several ancestors.

    Nothing is said where the policy loses nothing. With `accept` it is a warning on `console`.
    """
    groups = related_groups(scan.pair_distance)
    if len(groups) < 2 or policy in _LOSSLESS:
        return
    names = scan.variant_names
    split = " and ".join("{" + ", ".join(names[v] for v in group) + "}" for group in groups)
    pairs = [(i, j) for j in range(len(names)) for i in range(j)]
    shown = ", ".join(f"{names[i]}–{names[j]} {scan.pair_distance[i, j]:.2f}" for i, j in pairs)
    message = (
        f"{split} do not seem to have a common ancestor: the distances of their experts, relative to their weights, "
        f"are {shown}; fine-tunes of one model are well below {UNRELATED:g}."
    )
    if not accept:
        raise PlanError(
            f"{message} Serve them as they are with --policy separate, or share experts anyway with "
            "`polymoe plan … --force`."
        )
    if console is not None:
        warn(console, f"{message} They will share experts all the same.")
