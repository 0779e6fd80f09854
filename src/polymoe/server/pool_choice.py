"""Which of several pools a new variant goes to: the one whose experts are closest to its own, and that has room."""

import math

from polymoe.errors import ChangeRefusedError
from polymoe.protocol.planning import RankJob
from polymoe.server.arrival import Wanted
from polymoe.server.planner import Planner
from polymoe.server.variant_change import Change
from polymoe.server.variant_set import VariantSet

_ALIKE = 0.01  # distances that differ by less, of the larger one, are one


async def best_pool(sets: list[VariantSet], planner: Planner, change: Change, wanted: Wanted) -> VariantSet:
    """One of `sets`, those that may take it. Raises `ChangeRefusedError` where none can, saying why of each."""
    if len(sets) == 1:
        return sets[0]
    open_ones = [vset for vset in sets if _has_place(vset, change.name, wanted)]
    if not open_ones:
        full = ", ".join(f"{vset.pool} ({vset.client.info.max_variants})" for vset in sets)
        raise ChangeRefusedError(
            f"every pool holds as many versions as it may: {full}. Remove one, give `evict`, or deploy with more "
            "`max_variants`."
        )
    job = RankJob(bundles=[str(vset.folder) for vset in open_ones], name=change.name, spec=wanted.spec)
    answer = await planner.rank(job, change.set_progress)
    near = [(answer.distances[path], vset) for path, vset in zip(job.bundles, open_ones, strict=True)
            if path in answer.distances]  # fmt: skip
    if not near:
        reasons = " ".join(f"{vset.pool}: {answer.refusals[str(vset.folder)]}" for vset in open_ones)
        raise ChangeRefusedError(f"{change.name} fits no pool. {reasons}")
    least = min(distance for distance, _ in near)
    alike = [vset for distance, vset in near if distance - least <= _ALIKE * distance]
    free = {vset.pool: await vset.free_bytes() for vset in alike}
    best = max(alike, key=lambda vset: _room(free[vset.pool]))
    told = ", ".join(f"{distance:.3g} to {vset.pool}" for distance, vset in sorted(near, key=lambda item: item[0]))
    change.notes.append(f"pool {best.pool}; relative distances of experts: {told}")
    return best


def _has_place(vset: VariantSet, name: str, wanted: Wanted) -> bool:
    return len(vset.held) - len(vset.evictable(name, wanted.evict)) < vset.client.info.max_variants


def _room(free: int | None) -> float:
    return math.inf if free is None else free
