"""Everything but experts on disk: as the checkpoints store it, or packed as the plan says, a matrix at a time.

Files have wide values first. So the scales of all packed matrices come before the codes, which wait in a file of their
own meanwhile: no more than one matrix is in memory.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bundle.manifest import SHARED, FileRecord, PackedNonexpert, own_file, packed_name
from polymoe.bundle.tensor_file import TensorFileWriter, raw_bytes
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.encode.encode import in_pieces
from polymoe.offline.encode.position_codec import Group
from polymoe.offline.plan.correction import NO_DELTA, correction
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.offline.write.layer_writer import Declared, open_tensors
from polymoe.quant.formats import get_format
from polymoe.thread_pool import thread_pool

Owner = int | None  # the variant in whose file something is; None: the file of all together
Parts = Mapping[str, Tensor]


class NonexpertWriter:
    """Writes all files of `nonexperts/`.

    `files`: their records. `shared_bytes`, `own_bytes`: of the tensors in the shared file, in all others. `packed`: for
    the manifest.
    """

    def __init__(self, family: Family, scan: FamilyScan, plan: Plan) -> None:
        self.family, self.scan, self.plan = family, scan, plan
        self.files: list[FileRecord] = []
        self._hashes: dict[tuple[Owner, str], bytes] = {}
        owners: list[Owner] = [None, *range(len(family.names))]
        self._declared = {owner: self._declare(owner) for owner in owners}
        sizes = [
            sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self._declared[owner].values())
            for owner in owners
        ]
        self.shared_bytes, self.own_bytes = sizes[0], sum(sizes[1:])

    @property
    def _packed_names(self) -> list[str]:
        """In the order in which the files have them."""
        return [name for name in self.scan.nonexpert_same_as if name in self.plan.nonexperts]

    @property
    def packed(self) -> dict[str, PackedNonexpert]:
        return {
            name: PackedNonexpert(
                base=base, delta=None if delta == NO_DELTA else delta, shape=list(self._matrix(name)[1])
            )
            for name, (base, delta) in self.plan.nonexperts.items()
        }

    def hash(self, variant: int) -> bytes:
        """Over the packed matrices that serve a variant; nothing where there are none."""
        digest = hashlib.sha256()
        for name, formats in sorted(self.plan.nonexperts.items()):
            digest.update(f"{name}\0{formats}\0".encode())
            for owner in (None, self.scan.nonexpert_same_as[name][variant]):
                digest.update(self._hashes.get((owner, name), b""))
        return digest.digest() if self.plan.nonexperts else b""

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        with ExitStack() as stack, tempfile.TemporaryFile(dir=folder) as waiting:
            outputs = {
                owner: stack.enter_context(open_tensors(folder, self._file(owner), tensors, self.files))
                for owner, tensors in self._declared.items()
            }
            self._stored(outputs, lambda itemsize: itemsize > 1, advance)
            codes: list[tuple[Owner, str, Tensor]] = []  # without values: their sizes
            for name in self._packed_names:
                for owner, (fmt, parts) in self._encoded(name).items():
                    self._hashes[owner, name] = _hash(parts)
                    for part, tensor in parts.items():
                        stored_as = packed_name(fmt, name, part)
                        if tensor.itemsize > 1:
                            advance(outputs[owner].append(stored_as, tensor))
                        else:
                            waiting.write(raw_bytes(tensor))
                            codes.append((owner, stored_as, tensor.to("meta")))
            self._stored(outputs, lambda itemsize: itemsize == 1, advance)
            waiting.seek(0)
            for owner, stored_as, like in codes:
                read = torch.frombuffer(bytearray(waiting.read(like.numel())), dtype=torch.uint8)
                advance(outputs[owner].append(stored_as, read))

    def _stored(
        self, outputs: Mapping[Owner, TensorFileWriter], wanted: Callable[[int], bool], advance: Callable[[int], None]
    ) -> None:
        """What is as the checkpoints store it, file by file."""
        for owner, output in outputs.items():
            checkpoint = self.family.checkpoints[owner or 0]
            for name in output.names:
                if name in self.scan.nonexpert_same_as and wanted(checkpoint.dtype(name).itemsize):
                    advance(output.append(name, checkpoint.tensor(name)))

    def _encoded(self, name: str) -> dict[Owner, tuple[str, Parts]]:
        """File -> (format, packed parts) of one matrix."""
        base, delta = self.plan.nonexperts[name]
        same_as = self.scan.nonexpert_same_as[name]
        distinct = sorted(set(same_as))
        own = {v: self.family.checkpoints[v].tensor(name) for v in distinct}
        with thread_pool() as pool:
            if delta == NO_DELTA:
                found: dict[Owner, tuple[str, Parts]] = {}
                for v in distinct:
                    packed = in_pieces(Group(v, 0, (v,), get_format(base)), {v: own[v]}, same_as, pool)
                    assert packed.base is not None
                    found[v if len(distinct) > 1 else None] = base, packed.base
                return found
            group = Group(distinct[0], 0, tuple(distinct), get_format(base), "mean", correction(delta))
            packed = in_pieces(group, own, same_as, pool)
            assert packed.base is not None
            return {None: (base, packed.base), **{v: (delta, parts) for v, parts in packed.deltas.items()}}

    def _declare(self, owner: Owner) -> Declared:
        """Name in the file -> (dtype, shape): what is stored as it is, then what is packed."""
        stored: Declared = {}
        packed: Declared = {}
        for name, same_as in self.scan.nonexpert_same_as.items():
            distinct = set(same_as)
            alone = owner is None if len(distinct) == 1 else owner in distinct
            if name not in self.plan.nonexperts:
                if alone:
                    checkpoint = self.family.checkpoints[owner or 0]
                    stored[name] = checkpoint.dtype(name), checkpoint.shape(name)
                continue
            base, delta = self.plan.nonexperts[name]
            dtype, shape = self._matrix(name)
            if delta == NO_DELTA:
                fmt = base if alone else None
            else:
                fmt = base if owner is None else delta if owner in distinct else None
            if fmt is not None:
                parts = get_format(fmt).parts(shape, dtype)
                packed |= {packed_name(fmt, name, part): found for part, found in parts.items()}
        return stored | packed

    def _matrix(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        first = self.family.checkpoints[0]
        return first.dtype(name), first.shape(name)

    def _file(self, owner: Owner) -> str:
        return SHARED if owner is None else own_file(self.family.names[owner])


def _hash(parts: Parts) -> bytes:
    digest = hashlib.sha256()
    for part, tensor in sorted(parts.items()):
        digest.update(f"{part}\0{list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.digest()
