"""Packed matrices beside the experts, in the versions of variants that come and go while the model runs.

A variant that is added brings pools of its own, behind those that were planned, as `AddedExperts` has it for experts:

    bases   |-- planned --|-- of place 5, as its checkpoint stores it --|      deltas   |-- planned --|-- of place 7 --|

One row map serves all of these matrices: place p has row p, and a matrix's `versions` say what that row is made of.
What a planned variant had stays when that is removed, since others may build on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polymoe.bundle.addition import AddedFiles
from polymoe.bundle.live import OWN
from polymoe.bundle.reader import Bundle
from polymoe.kernels.cpu.packed_pool import PackedPool, StoredPool
from polymoe.kernels.cpu.packed_rows import PackedRows, packed_pool, stored_pool, versions
from polymoe.model.backends.base import Backend
from polymoe.model.transfer.pieces import copied, copy_in_pieces
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.quant.formats import get_format

Pair = tuple[int, int]  # a base and a delta, −1: none


@dataclass(frozen=True, eq=False)
class OwnMatrix:
    """What one variant brings to one matrix, at most one of base and delta. planned: what its row is made of where it
    brings nothing; the base below its delta."""

    planned: Pair
    base: StoredPool | None = None
    delta: PackedPool | None = None

    @property
    def num_bytes(self) -> int:
        return sum(pool.num_bytes for pool in (self.base, self.delta) if pool is not None)


OwnMatrices = Mapping[str, OwnMatrix]


class AddedPacked:
    """Owns what all added variants bring to the packed matrices. `weights`: name -> the matrix, whose rows are places.
    All methods but `load` belong between two steps. `has_changed`: as `AddedExperts` has it."""

    def __init__(self, weights: Mapping[str, PackedVariants], bundle: Bundle, backend: Backend) -> None:
        self._weights, self._bundle, self._backend = weights, bundle, backend
        self._planned: dict[str, PackedRows] = {name: weight.packed for name, weight in weights.items()}
        self._pairs: dict[str, list[Pair]] = {
            name: list(zip(rows.versions.base.tolist(), rows.versions.delta.tolist(), strict=True))
            for name, rows in self._planned.items()
        }
        self._own: dict[int, OwnMatrices] = {}
        self.has_changed = False

    def load(self, files: AddedFiles) -> OwnMatrices:
        """Copy what a variant brings to the device. May run beside forward passes."""
        return {name: self._load(files, name) for name in self._weights}

    def _load(self, files: AddedFiles, name: str) -> OwnMatrix:
        planned, pairs = self._planned[name], self._pairs[name]
        source = files.addition.nonexperts[name]
        if source != OWN:
            return OwnMatrix(pairs[source])
        packed = files.addition.packed.get(name)
        if packed is None:
            whole = torch.empty(1, *planned.shape, dtype=self._weights[name].own_dtype, device=planned.device)
            copy_in_pieces(whole[0], files.nonexpert(name))
            return OwnMatrix((-1, -1), base=stored_pool(whole))
        fmt = get_format(packed.delta, self._bundle.levels)
        parts = {part: copied(tensor[None], planned.device) for part, tensor in files.packed_nonexpert(name).items()}
        delta = packed_pool(fmt, parts, tuple(planned.shape))
        if planned.is_tiled:
            rows = PackedRows(planned.bases, (delta,), planned.versions, planned.shape)
            (delta,) = self._backend.laid_out_rows(rows, whole=True).deltas
        return OwnMatrix((pairs[packed.base][0], -1), delta=delta)

    def install(self, place: int, own: OwnMatrices) -> None:
        """From the next step on `place` is served with these."""
        self._own[place] = own
        self._lay_out()

    def remove(self, place: int) -> None:
        """Nothing runs at `place`."""
        if self._own.pop(place, None) is not None:
            self._lay_out()

    def _lay_out(self) -> None:
        """Put the pools behind each other, and say what each place's row is made of."""
        for name, planned in self._planned.items():
            bases, deltas, pairs = [*planned.bases], [*planned.deltas], [*self._pairs[name]]
            num_bases, num_deltas = sum(map(len, bases)), sum(map(len, deltas))
            for place, matrices in self._own.items():
                own = matrices[name]
                base, delta = own.planned
                if own.base is not None:
                    bases.append(own.base)
                    base, num_bases = num_bases, num_bases + 1
                if own.delta is not None:
                    deltas.append(own.delta)
                    delta, num_deltas = num_deltas, num_deltas + 1
                pairs[place] = base, delta
            rows = PackedRows(tuple(bases), tuple(deltas), versions(tuple(pairs)), planned.shape)
            self._weights[name].packed = rows
            self.has_changed = True

    @property
    def num_bytes(self) -> int:
        return sum(map(self.bytes_of, self._own))

    def bytes_of(self, place: int) -> int:
        return sum(matrix.num_bytes for matrix in self._own.get(place, {}).values())
