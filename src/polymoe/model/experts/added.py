"""Physical experts and deltas of variants that come and go while the model runs.

Each added variant brings pools of its own, behind those that were planned:

    bases   |-- planned --|-- room --|-- of place 5 --|-- of place 7 --|     deltas likewise, without room
    table   of a place: a planned base as it is, an own one where it is now

Where there is room (`ExpertRoom`, on a GPU) experts that are stored as they are come there, and nothing but the tables
changes. Else pools come and go: what stands behind a place that goes moves up, and tables are written anew, between two
steps; no weight is copied.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from polymoe.bundle.addition import AddedFiles
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool, StoredPool, join
from polymoe.model.backends.base import Backend
from polymoe.model.experts.layer import LayerExperts
from polymoe.model.experts.pool import ExpertPool
from polymoe.model.experts.room import ExpertRoom, expert_bytes
from polymoe.model.transfer.pieces import copied, copy_in_pieces
from polymoe.model.transfer.upload import upload
from polymoe.quant.formats import get_format

Rows = list[tuple[int, ...] | None]  # [L], of the room; None: there is too little of it


@dataclass(frozen=True, eq=False)
class OwnPools:
    """What one variant brings to one layer. rows: of the room, one for each expert of its own; empty where these are
    in `bases`."""

    bases: tuple[StoredPool, ...]
    deltas: tuple[PackedPool | ExactPool, ...]
    rows: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Beside the room."""
        return sum(pool.num_bytes for pool in (*self.bases, *self.deltas))


@dataclass(frozen=True, eq=False)
class OwnExperts:
    """What one variant brings to all L layers, and its tables as `AddedFiles` has them."""

    layers: list[OwnPools]
    table: torch.Tensor  # [L, E]
    delta: torch.Tensor
    sign: torch.Tensor

    @property
    def has_pools(self) -> bool:
        return any(pools.bases or pools.deltas for pools in self.layers)


class AddedExperts:
    """Owns the pools of all added variants, and the room. All methods but `load` belong between two steps.

    modules: the stock experts modules of the layers. room_bytes: of all layers together.
    has_changed: whether pools came or went since it was last set to False: who knows addresses has to look again.
    """

    def __init__(self, pool: ExpertPool, modules: Sequence[Any], backend: Backend, room_bytes: int = 0) -> None:
        self._pool, self._modules, self._backend = pool, modules, backend
        self._planned = [self._compressed(layer) for layer in pool.layers]
        self._own: dict[int, OwnExperts] = {}
        self._rooms: list[ExpertRoom] = []
        self.has_changed = False
        # Layer -> place -> the ids of its own bases and deltas in pools, in the order of its files.
        self._base_ids: list[dict[int, list[int]]] = [{} for _ in self._planned]
        self._delta_ids: list[dict[int, list[int]]] = [{} for _ in self._planned]
        # As planned: what ids in files count from.
        self._num_bases = [layer.num_bases for layer in self._planned]
        self._num_deltas = [layer.num_deltas for layer in self._planned]
        one = sum(expert_bytes(layer.stored) for layer in self._planned)
        most = pool.table.shape[0] * pool.table.shape[2]
        count = min(room_bytes // max(1, one), most)
        if count and not any(module.is_transposed for module in modules):  # whose kernels take none as stored
            self._rooms = [
                ExpertRoom(layer.stored, count, first)
                for layer, first in zip(self._planned, self._num_bases, strict=True)
            ]
            self._planned = [
                replace(layer, bases=(*layer.bases, room.pool))
                for layer, room in zip(self._planned, self._rooms, strict=True)
            ]
            self._lay_out()

    @staticmethod
    def _compressed(layer: LayerExperts) -> CompressedLayer:
        assert layer.compressed is not None, "the pool was not made to grow"
        return layer.compressed

    @property
    def room_bytes(self) -> int:
        return sum(room.pool.num_bytes for room in self._rooms)

    def reserve(self, files: AddedFiles) -> Rows:
        """Rows of the room for a variant's own experts."""
        counts = files.addition.own_experts
        if not self._rooms:
            return [None] * len(counts)
        return [room.take(count) for room, count in zip(self._rooms, counts, strict=True)]

    def has_room(self, files: AddedFiles) -> bool:
        """Whether `reserve` would find rows for all."""
        counts = files.addition.own_experts
        return bool(self._rooms) and all(
            count <= room.num_free for room, count in zip(self._rooms, counts, strict=True)
        )

    def give_back(self, rows: Iterable[tuple[int, ...] | None]) -> None:
        for room, own in zip(self._rooms, rows, strict=False):  # nothing without rooms
            room.give_back(own or ())

    def load(self, files: AddedFiles, rows: Rows) -> OwnExperts:
        """Copy a variant's pools to the device. May run beside forward passes."""
        layers = [self._load_layer(files, index, own) for index, own in enumerate(rows)]
        return OwnExperts(layers, files.table.clone(), files.delta.clone(), files.sign.clone())

    def _load_layer(self, files: AddedFiles, index: int, rows: tuple[int, ...] | None) -> OwnPools:
        pool, planned = self._pool, self._planned[index]
        dtype, device, shapes = pool.cache.dtype, pool.table.device, _packed_shapes(files)
        own = files.own_experts(index)
        if pool.turned:
            own = {name: t.transpose(1, 2) if t.ndim == 3 else t for name, t in own.items()}
        for name, tensor in own.items() if rows is not None else ():
            for row, expert in zip(rows or (), tensor, strict=True):
                copy_in_pieces(self._rooms[index].pool.tensors[name][row], expert)
        bases: tuple[StoredPool, ...] = ()
        if own and rows is None:
            bases = (StoredPool({name: copied(t, device, dtype) for name, t in own.items()}),)
        deltas: list[PackedPool | ExactPool] = []
        for name, tensors in files.own_deltas(index).items():
            fmt = get_format(name, files.manifest.levels)
            parts = {t: {part: copied(x, device) for part, x in group.items()} for t, group in tensors.items()}
            deltas.append(ExactPool(parts) if fmt.is_lossless else PackedPool(fmt, parts, shapes))
        made = CompressedLayer(planned.stored, bases, tuple(deltas), planned.transposed)
        if planned.is_tiled:
            made = self._backend.laid_out(self._modules[index], made, dtype)
        if device.type == "cpu":
            _ = made.stacks  # what kernels are told of each pool is worked out here, not between two steps
        return OwnPools(made.bases, made.deltas, rows or ())  # type: ignore[arg-type]

    def install(self, place: int, own: OwnExperts) -> None:
        """From the next step on `place` is served with these."""
        self._own[place] = own
        if own.has_pools:
            self._lay_out()
        else:
            self._point(place)

    def remove(self, place: int) -> None:
        """Nothing runs at `place`."""
        for table, value in ((self._pool.table, 0), (self._pool.delta, -1), (self._pool.sign, 1)):
            if table is not None:
                table[place].fill_(value)
        own = self._own.pop(place, None)
        if own is None:
            return
        self.give_back(pools.rows for pools in own.layers)
        if own.has_pools:
            self._lay_out()

    def _lay_out(self) -> None:
        """Put the pools behind each other and say so in the tables."""
        for index, layer in enumerate(self._pool.layers):
            planned = self._planned[index]
            own = {place: experts.layers[index] for place, experts in self._own.items()}
            bases, ids = [*planned.bases], self._base_ids[index]
            ids.clear()
            first = planned.num_bases
            for place, pools in own.items():
                for base in pools.bases:
                    ids.setdefault(place, []).extend(range(first, first + len(base)))
                    first += len(base)
                bases += pools.bases
            deltas = self._laid_out_deltas(index)
            layer.compressed = CompressedLayer(planned.stored, tuple(bases), deltas, planned.transposed)
            layer.compute = self._backend.prepare_experts(self._modules[index], layer.described)
        for place in self._own:
            self._point(place)
        self.has_changed = True

    def _laid_out_deltas(self, index: int) -> tuple[PackedPool | ExactPool, ...]:
        """A layer's pools in the order of their ids. Where a backend takes one lossless pool those of all are joined,
        behind the planned one, which is the last of the planned."""
        planned = self._planned[index]
        own = [(place, pool) for place, experts in self._own.items() for pool in experts.layers[index].deltas]
        if self._backend.takes_one_exact_pool:
            own.sort(key=lambda found: not isinstance(found[1], ExactPool))
        ids, first = self._delta_ids[index], planned.num_deltas
        ids.clear()
        for place, pool in own:
            ids.setdefault(place, []).extend(range(first, first + len(pool)))
            first += len(pool)
        pools = [*planned.deltas, *(pool for _, pool in own)]
        exact = [pool for pool in pools if isinstance(pool, ExactPool)]
        if len(exact) < 2 or not self._backend.takes_one_exact_pool:
            return tuple(pools)
        joined, parts = join(exact)
        begin = pools.index(exact[0])
        # Who held one holds a part of the joined one, so that no delta is on the device twice.
        replaced = dict(zip(map(id, exact), parts, strict=True))

        def kept(held: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(replaced.get(id(pool), pool) for pool in held)

        self._planned[index] = replace(planned, deltas=kept(planned.deltas))
        for experts in self._own.values():
            experts.layers[index] = replace(experts.layers[index], deltas=kept(experts.layers[index].deltas))
        return (*pools[:begin], joined, *pools[begin + len(exact) :])

    def _point(self, place: int) -> None:
        """Say in the tables where a place's experts are now."""
        own, device = self._own[place], self._pool.table.device
        table, delta = own.table.clone(), own.delta.clone()
        for index, pools in enumerate(own.layers):
            rows = [self._rooms[index].first + row for row in pools.rows]
            _replace(table[index], self._num_bases[index], rows or self._base_ids[index].get(place, []))
            _replace(delta[index], self._num_deltas[index], self._delta_ids[index].get(place, []))
        assert self._pool.delta is not None
        assert self._pool.sign is not None
        targets = (self._pool.table, self._pool.delta, self._pool.sign)
        for target, values in zip(targets, (table, delta, own.sign), strict=True):
            target[place].copy_(upload(values, device))

    @property
    def own_bytes(self) -> int:
        """Of pools beside the room."""
        return sum(pools.num_bytes for own in self._own.values() for pools in own.layers)

    def bytes_of(self, place: int) -> int:
        own = self._own.get(place)
        if own is None:
            return 0
        in_room = sum(len(p.rows) * room.expert_bytes for p, room in zip(own.layers, self._rooms, strict=False))
        return in_room + sum(pools.num_bytes for pools in own.layers)


def _replace(ids: torch.Tensor, planned: int, own: Sequence[int]) -> None:
    """In place: of ids from `planned` on, which count own ones, those that these have now."""
    is_own = ids >= planned
    if own:
        ids[is_own] = torch.tensor(own, dtype=ids.dtype)[(ids[is_own] - planned).long()]


def _packed_shapes(files: AddedFiles) -> dict[str, tuple[int, ...]]:
    flip = -1 if files.manifest.transposed else 1
    return {name: tuple(shape[::flip]) for name, shape in files.manifest.expert_shapes.items()}
