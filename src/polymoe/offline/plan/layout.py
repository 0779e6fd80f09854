"""Where each physical base and delta of a plan lies: the numbering that tables, files and pools share.

A layer's bases lie in one *pool* a format, its deltas too. Physical ids run through the pools in the order of
`BASE_FORMATS` and `DELTA_FORMATS`:  |-- stored --|-- fp8 --|-- int8 --|-- int4 --|
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polymoe.offline.plan.plan import Plan
from polymoe.quant.formats import BASE_FORMATS, DELTA_FORMATS, Format, get_format

Owners = tuple[tuple[int, int], ...]  # (variant, expert) of each physical expert, by expert, then variant
Pools = dict[str, Owners]  # format -> what its pool holds, in the order of numbering; no empty pools


@dataclass(frozen=True, eq=False)
class PhysicalLayout:
    """`table` int32 [V, L, E]: p >= 0 is physical base p of the layer, −1 − h is index h of its host list.

    `delta` int32 [V, L, E]: physical delta of the layer, −1 for none. `sign` int8 [V, L, E], or None where all are 1.
    `bases[l]`, `deltas[l]`: the layer's pools. `host[l]`: its host list.
    """

    table: NDArray[np.int32]
    delta: NDArray[np.int32]
    sign: NDArray[np.int8] | None
    bases: tuple[Pools, ...]
    deltas: tuple[Pools, ...]
    host: tuple[Owners, ...]

    @property
    def resident(self) -> tuple[Owners, ...]:
        """Per layer, (variant, expert) of physical base 0, 1, …"""
        return tuple(tuple(owner for pool in pools.values() for owner in pool) for pools in self.bases)

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables on the device; those that say nothing are left out."""
        delta = self.delta.nbytes if any(self.deltas) else 0
        return self.table.nbytes + delta + (0 if self.sign is None else self.sign.nbytes)

    @property
    def has_lossless_deltas(self) -> bool:
        """Then their bytes are known when they are made."""
        return any(get_format(name).is_lossless for pools in self.deltas for name in pools)


class _Numbering:
    """The pools of one layer while they fill up."""

    def __init__(self, formats: Iterable[Format]) -> None:
        self.pools: dict[str, list[tuple[int, int]]] = {fmt.name: [] for fmt in formats}
        self._users: list[tuple[str, int, NDArray[np.bool_], int]] = []

    def add(self, format_name: str, owner: tuple[int, int], users: NDArray[np.bool_]) -> None:
        """`users` bool [V]: the variants that `owner`'s base or delta serves."""
        pool = self.pools[format_name]
        self._users.append((format_name, len(pool), users, owner[1]))
        pool.append(owner)

    def number(self, table: NDArray[np.int32]) -> Pools:
        """Write the ids into `table` [V, E]. Returns the pools that are not empty."""
        start = dict(zip(self.pools, np.cumsum([0, *map(len, self.pools.values())]), strict=False))
        for format_name, index, users, expert in self._users:
            table[users, expert] = start[format_name] + index
        return {name: tuple(pool) for name, pool in self.pools.items() if pool}


def lay_out(plan: Plan) -> PhysicalLayout:
    """Number the physical bases, deltas and host experts of each layer."""
    _, num_layers, num_experts = plan.serving.shape
    table = np.zeros(plan.serving.shape, dtype=np.int32)
    delta = np.full(plan.serving.shape, -1, dtype=np.int32)
    bases, deltas, hosts = [], [], []
    for layer in range(num_layers):
        base_ids, delta_ids = _Numbering(BASE_FORMATS), _Numbering(DELTA_FORMATS)
        host: list[tuple[int, int]] = []
        for expert in range(num_experts):
            here, on_device = plan.serving[:, layer, expert], plan.resident[:, layer, expert]
            for owner in sorted(set(here.tolist())):
                users = here == owner
                if on_device[users][0]:
                    base_ids.add(plan.base[layer, expert], (owner, expert), users)
                else:
                    table[users, layer, expert] = -1 - len(host)
                    host.append((owner, expert))
            owners = plan.delta_owner[:, layer, expert]
            for owner in sorted(set(owners.tolist()) - {-1}):
                delta_ids.add(plan.delta_format(layer, expert), (owner, expert), owners == owner)
        bases.append(base_ids.number(table[:, layer]))
        deltas.append(delta_ids.number(delta[:, layer]))
        hosts.append(tuple(host))
    sign = plan.sign
    return PhysicalLayout(
        table, delta, sign if bool((sign < 0).any()) else None, tuple(bases), tuple(deltas), tuple(hosts)
    )


def table(plan: Plan) -> NDArray[np.int32]:
    """int32 [V, L, E]: >= 0 a physical base of the layer, −1 − h index h of its host list."""
    return lay_out(plan).table
