"""One layer's experts on disk: both tiers, verbatim, packed and deltas, each stored tensor of the family read once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bundle.manifest import FileRecord, delta_file, host_file, packed_name, resident_file
from polymoe.bundle.tensor_file import TensorFileWriter, raw_bytes
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.encode.encoded_layer import EncodedLayer, Packed
from polymoe.offline.plan.layout import Owners, PhysicalLayout
from polymoe.offline.plan.plan import STORED, Plan
from polymoe.quant.formats import get_format
from polymoe.thread_pool import thread_pool

Declared = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Pieces = dict[str, list[Tensor]]  # tensor name in the file -> what it is made of, along the first axis
Advance = Callable[[int], None]


class LayerWriter:
    """Writes layer after layer and remembers what was written.

    `files`: their records. `base_bytes`, `delta_bytes`, `host_bytes`: of the tensors so far. `hashes`:
    (layer, variant, expert, "base" | "delta") -> SHA-256 of what is not a checkpoint's expert verbatim.
    """

    def __init__(self, family: Family, plan: Plan, layout: PhysicalLayout, transposed: bool) -> None:
        self.family, self.plan, self.layout, self.transposed = family, plan, layout, transposed
        self.files: list[FileRecord] = []
        self.base_bytes = self.delta_bytes = self.host_bytes = 0
        self.hashes: dict[tuple[int, int, int, str], bytes] = {}

    def write(self, folder: Path, layer: int, encoded: EncodedLayer, advance: Advance) -> None:
        """`encoded` holds what is not verbatim; see `polymoe.offline.encode.encode`."""
        pools = self.layout.bases[layer]
        packed = [
            _pool(n, [encoded.bases[o] for o in owners]) for n, owners in pools.items() if get_format(n).is_packed
        ]
        deltas = [_pool(n, [encoded.deltas[o] for o in owners]) for n, owners in self.layout.deltas[layer].items()]
        self._experts(folder, layer, pools.get(STORED, ()), encoded, _joined(packed), advance)
        if any(self.layout.deltas):
            self._deltas(folder, layer, _joined(deltas), advance)
        with thread_pool() as pool:
            for kind, owners_of, found in (
                ("base", pools, encoded.bases),
                ("delta", self.layout.deltas[layer], encoded.deltas),
            ):
                own = [owner for owners in owners_of.values() for owner in owners if owner in found]
                digests = pool.map(_packed_hash, [found[owner] for owner in own])
                self.hashes.update(((layer, *owner, kind), d) for owner, d in zip(own, digests, strict=True))

    def _experts(
        self,
        folder: Path,
        layer: int,
        stored: Owners,
        encoded: EncodedLayer,
        packed: Pieces,
        advance: Advance,
    ) -> None:
        """The resident and the host file, tensor by tensor."""
        info, variants = self.family.architecture, self.family.checkpoints
        host = self.layout.host[layer]
        dtypes = {tensor: variants[0].dtype(info.expert_tensor(layer, tensor)) for tensor in info.expert_shapes}
        stacks: Declared = {t: (dtypes[t], (len(stored), *shape)) for t, shape in info.expert_shapes.items()}
        singles: Declared = {
            f"{h}.{t}": (dtypes[t], tuple(shape)) for t, shape in info.expert_shapes.items() for h in range(len(host))
        }
        verbatim = {v for v, expert in stored if self.plan.is_verbatim(layer, expert)} | {v for v, _ in host}
        with (
            open_tensors(folder, resident_file(layer), stacks | _declared(packed), self.files) as on_device,
            open_tensors(folder, host_file(layer), singles, self.files) as on_host,
        ):
            for name in on_device.names:
                for piece in packed.get(name, ()):
                    self.base_bytes += (count := on_device.append(name, piece))
                    advance(count)
                if name in packed:
                    continue
                loaded = {v: variants[v].tensor(info.expert_tensor(layer, name)) for v in verbatim}
                for owner, expert in stored:
                    if self.plan.is_verbatim(layer, expert):
                        weight = loaded[owner][expert]
                    else:
                        weight = self._stock_layout(encoded.bases[owner, expert][name][""])
                    self.base_bytes += (count := on_device.append(name, weight))
                    advance(count)
                for h, (owner, expert) in enumerate(host):
                    self.host_bytes += (count := on_host.append(f"{h}.{name}", loaded[owner][expert]))
                    advance(count)

    def _stock_layout(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed and weight.ndim == 2 else weight

    def _deltas(self, folder: Path, layer: int, deltas: Pieces, advance: Advance) -> None:
        with open_tensors(folder, delta_file(layer), _declared(deltas), self.files) as output:
            for name in output.names:
                for piece in deltas[name]:
                    self.delta_bytes += (count := output.append(name, piece))
                    advance(count)


@contextmanager
def open_tensors(folder: Path, path: str, tensors: Declared, files: list[FileRecord]) -> Iterator[TensorFileWriter]:
    """A tensor file while it is written; on success its record is appended to `files`. An exception leaves it as it
    is, without a check; the caller removes the folder."""
    output = TensorFileWriter(folder / path, tensors)
    try:
        yield output
    except BaseException:
        output.abandon()
        raise
    written = output.close()
    files.append(FileRecord(path, written.size, written.sha256))


def _pool(format_name: str, experts: list[Packed]) -> Pieces:
    """The tensors of one pool, as its format puts experts together."""
    fmt = get_format(format_name)
    return {
        packed_name(format_name, tensor, part): pieces
        for tensor in experts[0]
        for part, pieces in fmt.pool([expert[tensor] for expert in experts]).items()
    }


def _joined(pools: Iterable[Pieces]) -> Pieces:
    return {name: pieces for pool in pools for name, pieces in pool.items()}


def _declared(tensors: Pieces) -> Declared:
    return {
        name: (pieces[0].dtype, (sum(len(piece) for piece in pieces), *pieces[0].shape[1:]))
        for name, pieces in tensors.items()
    }


def _packed_hash(packed: Packed) -> bytes:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in sorted(packed):
        for part, value in sorted(packed[tensor].items()):
            digest.update(f"{tensor}\0{part}\0{value.dtype}{list(value.shape)}".encode())
            digest.update(raw_bytes(value))
    return digest.digest()
