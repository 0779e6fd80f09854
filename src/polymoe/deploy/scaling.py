"""How many replicas a pool is given: by the work that they have, and by how long first tokens take.

Ray calls `PoolPolicy` in its controller, about once a second; delays, factors and bounds are Ray's, of the pool's
`autoscaling`.
"""

from __future__ import annotations

import math
from typing import Any

MOST_AT_ONCE = 2.0  # times as many replicas, by first tokens alone


def wanted_replicas(replicas: int, work: float, first_token: float, ongoing: float, most_first_token: float) -> int:
    """Replicas that have `ongoing` sequences each, and more where first tokens come late.

    Args:
        work: sequences that run or wait, of all replicas.
        first_token: seconds, of the slowest replica.
        most_first_token: seconds that are aimed at; 0: they do not matter.
    """
    by_work = math.ceil(work / ongoing - 1e-9)
    if most_first_token <= 0 or first_token <= most_first_token:
        # One that is just quick enough is not taken away as long as it is needed for that.
        close = most_first_token > 0 and first_token > 0.5 * most_first_token
        return max(by_work, replicas if close else 0)
    return max(by_work, math.ceil(replicas * min(MOST_AT_ONCE, first_token / most_first_token)))


class PoolPolicy:
    """An autoscaling policy of Ray Serve over what replicas record."""

    def __init__(self, ongoing: float, most_first_token: float = 0.0) -> None:
        self._ongoing, self._most_first_token = ongoing, most_first_token

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: Ray's `AutoscalingContext`. Returns (replicas, the policy's state)."""
        found = context.aggregated_metrics or {}
        work, first = found.get("work", {}), found.get("first_token", {})
        if not work:  # nobody has said anything yet
            return context.target_num_replicas, {}
        wanted = wanted_replicas(
            context.current_num_replicas, sum(work.values()), max(first.values(), default=0.0), self._ongoing,
            self._most_first_token,
        )  # fmt: skip
        return wanted, {}
