"""What a served bundle has at each position: the experts that a new variant may share or be a correction of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.bundle.reader import Bundle
from polymoe.offline.checkpoint.matrices import as_matrix
from polymoe.quant.exact import changed
from polymoe.quant.format import Format
from polymoe.quant.formats import STORED, get_format

Expert = dict[str, Tensor]  # tensor name -> [O, I] or [O]
_SAMPLE = 4096  # values of a tensor that tell which expert is the nearest


@dataclass(frozen=True)
class Entry:
    """One entry of the tables: what serves a planned variant at a position."""

    table: int
    delta: int = -1
    sign: int = 1


class PlannedLayer:
    """One layer of the bundle. Matrices are `[out, in]`, whatever the stock module holds."""

    def __init__(self, bundle: Bundle, layer: int) -> None:
        self._bundle, self._layer = bundle, layer
        manifest = bundle.manifest
        self._transposed = manifest.transposed
        self._stored = bundle.resident_experts(layer)
        self._packed = bundle.packed_bases(layer)
        self._deltas = bundle.packed_deltas(layer)
        self._base_pools, self._delta_pools = manifest.base_pools[layer], manifest.delta_pools[layer]

    def entries(self, expert: int) -> list[Entry]:
        """What serves the planned variants at the position, each once."""
        found: dict[Entry, None] = {}
        for v in range(len(self._bundle.variants)):
            delta = -1 if self._bundle.delta is None else int(self._bundle.delta[v, self._layer, expert])
            sign = 1 if self._bundle.sign is None else int(self._bundle.sign[v, self._layer, expert])
            found[Entry(int(self._bundle.table[v, self._layer, expert]), delta, sign)] = None
        return list(found)

    def exact(self, entry: Entry) -> Expert | None:
        """The expert, where it is served bit for bit as a checkpoint has it."""
        if entry.table < 0:
            return self._matrices(self._bundle.host_expert(self._layer, -1 - entry.table))
        base = self.stored_base(entry.table)
        if base is None or entry.delta < 0:
            return base
        fmt, index = _find(self._delta_pools, entry.delta, self._bundle.levels)
        if not fmt.is_lossless:
            return None
        pools = self._deltas[fmt.name]
        return {name: fmt.corrected(weight, fmt.entry(pools[name], index)) for name, weight in base.items()}

    def stored_base(self, index: int) -> Expert | None:
        """A base that is stored as a checkpoint has it, or was merged in that dtype; None for a packed one."""
        if not 0 <= index < self._base_pools.get(STORED.name, 0):
            return None
        return self._matrices({name: stack[index] for name, stack in self._stored.items()})

    def base(self, index: int) -> Expert:
        """A base as it is served; a packed one in float32."""
        stored = self.stored_base(index)
        if stored is not None:
            return stored
        fmt, place = _find(self._base_pools, index, self._bundle.levels)
        pools, shapes = self._packed[fmt.name], self._bundle.packed_shapes
        return {n: fmt.decode(fmt.entry(pools[n], place), shapes[n], torch.float32) for n in shapes}

    def _matrices(self, expert: dict[str, Tensor]) -> Expert:
        return {name: as_matrix(weight, self._transposed) for name, weight in expert.items()}


def _find(pools: dict[str, int], index: int, levels: str) -> tuple[Format, int]:
    """The format of the pool that `index` is in, and its place there."""
    for name, count in pools.items():
        if index < count:
            return get_format(name, levels), index
        index -= count
    raise IndexError(index)


def nearest(weights: Expert, others: Iterator[tuple[int, Expert]]) -> tuple[int, float] | None:
    """(key, share of equal values) of the expert with the most values in common with `weights`, by a sample of each
    tensor; None where there is none to compare with."""
    best: tuple[int, float] | None = None
    for key, other in others:
        equal = total = 0
        for name, weight in weights.items():
            a, b = weight.reshape(-1)[:_SAMPLE], other[name].reshape(-1)[:_SAMPLE]
            if a.dtype == b.dtype:
                equal += int((~changed(a, b)).sum())
            total += len(a)
        share = equal / max(1, total)
        if best is None or share > best[1]:
            best = key, share
    return best
