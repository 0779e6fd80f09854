"""Physical experts and deltas of variants that come and go while the model runs.

Each added variant brings pools of its own, behind those that were planned:

    bases   |-- planned --|-- of place 5 --|-- of place 7 --|     deltas likewise
    table   of a place: a planned base as it is, an own one behind the planned and those of the places before it

When one goes, what stands behind it moves up: tables are written anew, between two steps, and no weight is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.bundle.addition import AddedFiles
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool, StoredPool
from polymoe.model.backends.base import Backend
from polymoe.model.experts.layer import LayerExperts
from polymoe.model.experts.pool import ExpertPool
from polymoe.model.transfer.pieces import copied
from polymoe.quant.formats import get_format


@dataclass(frozen=True, eq=False)
class OwnPools:
    """What one variant brings to one layer."""

    bases: tuple[StoredPool, ...]
    deltas: tuple[PackedPool | ExactPool, ...]

    @property
    def num_bytes(self) -> int:
        return sum(pool.num_bytes for pool in (*self.bases, *self.deltas))


@dataclass(frozen=True, eq=False)
class OwnExperts:
    """What one variant brings to all L layers, and its tables as `AddedFiles` has them."""

    layers: list[OwnPools]
    table: torch.Tensor  # [L, E]
    delta: torch.Tensor
    sign: torch.Tensor


class AddedExperts:
    """Owns the pools of all added variants. `modules`: the stock experts modules of the layers."""

    def __init__(self, pool: ExpertPool, modules: Sequence[Any], backend: Backend) -> None:
        self._pool, self._modules, self._backend = pool, modules, backend
        self._planned = [self._compressed(layer) for layer in pool.layers]
        self._own: dict[int, OwnExperts] = {}

    @staticmethod
    def _compressed(layer: LayerExperts) -> CompressedLayer:
        assert layer.compressed is not None, "the pool was not made to grow"
        return layer.compressed

    def load(self, files: AddedFiles) -> OwnExperts:
        """Copy a variant's pools to the device. May run beside forward passes."""
        layers = [self._load_layer(files, index) for index in range(len(self._planned))]
        return OwnExperts(layers, files.table.clone(), files.delta.clone(), files.sign.clone())

    def _load_layer(self, files: AddedFiles, index: int) -> OwnPools:
        pool, planned = self._pool, self._planned[index]
        dtype, device, shapes = pool.cache.dtype, pool.table.device, _packed_shapes(files)
        own = files.own_experts(index)
        if pool.turned:
            own = {name: t.transpose(1, 2) if t.ndim == 3 else t for name, t in own.items()}
        bases = (StoredPool({name: copied(t, device, dtype) for name, t in own.items()}),) if own else ()
        deltas: list[PackedPool | ExactPool] = []
        for name, tensors in files.own_deltas(index).items():
            fmt = get_format(name, files.manifest.levels)
            parts = {t: {part: copied(x, device) for part, x in group.items()} for t, group in tensors.items()}
            deltas.append(ExactPool(parts) if fmt.is_lossless else PackedPool(fmt, parts, shapes))
        made = CompressedLayer(planned.stored, bases, tuple(deltas), planned.transposed)
        if planned.is_tiled:
            made = self._backend.laid_out(self._modules[index], made, dtype)
        _ = made.stacks  # what kernels are told of each pool is worked out here, not between two steps
        return OwnPools(made.bases, made.deltas)  # type: ignore[arg-type]

    def install(self, place: int, own: OwnExperts) -> None:
        """From the next step on `place` is served with these. Between two steps."""
        self._own[place] = own
        self._lay_out()

    def remove(self, place: int) -> None:
        """Between two steps, when nothing runs at `place`."""
        self._own.pop(place, None)
        for table, value in ((self._pool.table, 0), (self._pool.delta, -1), (self._pool.sign, 1)):
            if table is not None:
                table[place].fill_(value)
        self._lay_out()

    def _lay_out(self) -> None:
        """Put the pools behind each other and say so in the tables."""
        table, delta, sign = self._pool.table, self._pool.delta, self._pool.sign
        assert delta is not None
        assert sign is not None
        for index, (layer, planned) in enumerate(zip(self._pool.layers, self._planned, strict=True)):
            bases, deltas = [*planned.bases], [*planned.deltas]
            num_bases, num_deltas = planned.num_bases, planned.num_deltas
            for place, own in self._own.items():
                pools = own.layers[index]
                moved = num_bases - planned.num_bases, num_deltas - planned.num_deltas
                table[place, index] = _moved(own.table[index], planned.num_bases, moved[0]).to(table.device)
                delta[place, index] = _moved(own.delta[index], planned.num_deltas, moved[1]).to(table.device)
                sign[place, index] = own.sign[index].to(table.device)
                bases += pools.bases
                deltas += pools.deltas
                num_bases += sum(map(len, pools.bases))
                num_deltas += sum(map(len, pools.deltas))
            layer.compressed = CompressedLayer(planned.stored, tuple(bases), tuple(deltas), planned.transposed)
            layer.compute = self._backend.prepare_experts(self._modules[index], layer.described)

    @property
    def num_bytes(self) -> int:
        return sum(pools.num_bytes for own in self._own.values() for pools in own.layers)

    def bytes_of(self, place: int) -> int:
        own = self._own.get(place)
        return 0 if own is None else sum(pools.num_bytes for pools in own.layers)


def _moved(ids: torch.Tensor, planned: int, by: int) -> torch.Tensor:
    """Own ids (from `planned` on) behind those of the variants before."""
    return torch.where(ids >= planned, ids + by, ids)


def _packed_shapes(files: AddedFiles) -> dict[str, tuple[int, ...]]:
    flip = -1 if files.manifest.transposed else 1
    return {name: tuple(shape[::flip]) for name, shape in files.manifest.expert_shapes.items()}
