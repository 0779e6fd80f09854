"""Plan what a new variant needs beside what is served, and write only that.

An expert that a planned variant has too, bit for bit, is shared. Of another one the changed values are stored where
that is less than the expert; else the expert itself. Both are lossless. With `bits` a correction of so many bits is
stored instead, against the base that is there.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bundle.live import (
    ADDED_NONEXPERTS,
    ADDED_TABLES,
    ADDED_VARIANT,
    OWN,
    Addition,
    added_folder,
    added_layer,
)
from polymoe.bundle.manifest import FileRecord, packed_name
from polymoe.bundle.reader import Bundle
from polymoe.bundle.tensor_file import raw_bytes
from polymoe.config import format_bytes
from polymoe.errors import CheckpointError, PlanError
from polymoe.offline.addition.new_variant import NewVariant
from polymoe.offline.addition.planned import Entry, Expert, PlannedLayer, nearest, same_bits
from polymoe.offline.checkpoint.configs import max_model_len
from polymoe.offline.checkpoint.matrices import as_matrix
from polymoe.offline.checkpoint.source import TOKENIZER_FILES, side_files
from polymoe.offline.similarity.scan import tensor_hash
from polymoe.offline.write.layer_writer import open_tensors
from polymoe.quant.exact import changed, encode_exact, exact_bytes
from polymoe.quant.format import Format
from polymoe.quant.formats import EXACT, get_format
from polymoe.thread_pool import thread_pool

Progress = Callable[[str, float], None]
_WORTH = 0.9  # of the expert's bytes that its changes may take
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class _Choice:
    """How one expert is served: as a planned one, as its own, or by a delta of `fmt` on a planned base."""

    entry: Entry | None = None
    base: int = -1
    fmt: Format | None = None
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(eq=False)
class _Totals:
    experts: int = 0
    deltas: int = 0
    nonexperts: int = 0
    shared: int = 0

    @property
    def total(self) -> int:
        return self.experts + self.deltas + self.nonexperts


def write_addition(
    bundle: Bundle,
    new: NewVariant,
    folder: Path,
    free_bytes: int | None = None,
    bits: int | None = None,
    progress: Progress = lambda _stage, _fraction: None,
) -> tuple[Addition, list[FileRecord]]:
    """Write the files of an addition into the empty `folder`; the records' paths are those that they will have.

    Args:
        free_bytes: on the device, for what it brings.
        bits: of corrections, 1 to 5; None: lossless.

    Raises: `PlanError` where it does not fit, `CheckpointError` for weights that cannot be read or are not finite,
    `OSError` where it cannot be written.
    """
    return _Writer(bundle, new, folder, free_bytes, bits, progress).write()


class _Writer:
    def __init__(
        self, bundle: Bundle, new: NewVariant, folder: Path, free_bytes: int | None, bits: int | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.bundle, self.new, self.folder, self.progress = bundle, new, folder, progress
        self.free_bytes, self.bits = free_bytes, bits
        self.checkpoint, self.info = new.checkpoint, new.checkpoint.architecture
        self.files: list[FileRecord] = []
        self.totals = _Totals()
        self.digest = hashlib.sha256(b"addition\0")
        shape = (self.info.num_layers, self.info.num_experts)
        self.table = torch.zeros(shape, dtype=torch.int32)
        self.delta = torch.full(shape, -1, dtype=torch.int32)
        self.sign = torch.ones(shape, dtype=torch.int8)
        self.own_experts: list[int] = []
        self.deltas: list[dict[str, int]] = []
        # What it builds on is a part of what it is.
        for record in bundle.manifest.files:
            if record.path.startswith(("experts/", "deltas/", "nonexperts/")):
                self.digest.update(f"{record.path}\0{record.sha256}".encode())

    def write(self) -> tuple[Addition, list[FileRecord]]:
        with thread_pool() as pool:
            nonexperts = self._nonexperts(pool)
            for layer in range(self.info.num_layers):
                self.progress("comparing and encoding", layer / self.info.num_layers)
                self._layer(layer, pool)
        tables = {"table": self.table, "delta": self.delta, "sign": self.sign}
        self._tensors(ADDED_TABLES, tables)
        for tensor in tables.values():
            self.digest.update(raw_bytes(tensor))
        has_tokenizer = self._side_files()
        version = self.digest.hexdigest()
        prefix = added_folder(version)
        addition = Addition(
            name=self.checkpoint.name,
            version=version,
            source=self.checkpoint.spec,
            source_path=str(self.checkpoint.place),
            max_model_len=max_model_len(self.checkpoint.config),
            vocab_size=self.new.vocab_size,
            has_tokenizer=has_tokenizer,
            created=int(time.time()),
            own_experts=self.own_experts,
            deltas=self.deltas,
            nonexperts=nonexperts,
            expert_bytes=self.totals.experts,
            delta_bytes=self.totals.deltas,
            nonexpert_bytes=self.totals.nonexperts,
            lossless=self.bits is None,
            shared_experts=self.totals.shared,
        )
        self.progress("comparing and encoding", 1.0)
        return addition, [FileRecord(f"{prefix}/{r.path}", r.size, r.sha256) for r in self.files]

    def _nonexperts(self, pool: ThreadPoolExecutor) -> dict[str, int]:
        """Name -> the planned variant with the same tensor, or `OWN`; own ones are written."""
        found: dict[str, int] = {}
        own: dict[str, Tensor] = {}

        def compare(name: str) -> tuple[str, Tensor, int]:
            weight = self.checkpoint.tensor(name)
            self._check_finite(name, weight)
            sources = dict.fromkeys(self.bundle.nonexpert_sources(name))
            return name, weight, next((v for v in sources if same_bits(weight, self.bundle.nonexpert(v, name))), OWN)

        for done, (name, weight, source) in enumerate(pool.map(compare, sorted(self.info.nonexperts))):
            self.progress("comparing what is no expert", done / len(self.info.nonexperts))
            found[name] = source
            self.digest.update(f"{name}\0{source if source != OWN else 'own'}\0".encode())
            if source == OWN:
                own[name] = weight
                self.totals.nonexperts += weight.nbytes
                self.digest.update(tensor_hash(weight))
        self._check_room(0.0)
        self._tensors(ADDED_NONEXPERTS, own)
        return {name: found[name] for name in self.bundle.manifest.nonexperts}

    def _layer(self, layer: int, pool: ThreadPoolExecutor) -> None:
        info, planned = self.info, PlannedLayer(self.bundle, layer)
        stacks = {t: self.checkpoint.tensor(info.expert_tensor(layer, t)) for t in info.expert_shapes}
        for tensor, stack in stacks.items():
            self._check_finite(info.expert_tensor(layer, tensor), stack)
        transposed = self.bundle.manifest.transposed

        def choose(expert: int) -> _Choice:
            weights = {t: as_matrix(stack[expert], transposed) for t, stack in stacks.items()}
            return self._choose(planned, expert, weights)

        choices = list(pool.map(choose, range(info.num_experts)))
        bases = self.bundle.manifest.resident_experts[layer]
        first_delta = sum(self.bundle.manifest.delta_pools[layer].values())
        own = [expert for expert, c in enumerate(choices) if c.entry is None and c.fmt is None]
        by_format: dict[str, list[int]] = {}
        for expert, choice in enumerate(choices):
            if choice.fmt is not None:
                by_format.setdefault(choice.fmt.name, []).append(expert)
            if choice.entry is not None:
                entry = choice.entry
                self.table[layer, expert], self.delta[layer, expert] = entry.table, entry.delta
                self.sign[layer, expert] = entry.sign
                self.totals.shared += 1
        for place, expert in enumerate(own):
            self.table[layer, expert] = bases + place
        place = first_delta
        for experts in by_format.values():
            for expert in experts:
                self.table[layer, expert], self.delta[layer, expert] = choices[expert].base, place
                place += 1
        self.own_experts.append(len(own))
        self.deltas.append({name: len(experts) for name, experts in by_format.items()})
        pieces: dict[str, Tensor] = {}
        if own:
            for tensor, stack in stacks.items():
                pieces[tensor] = stack[own]
                self.totals.experts += pieces[tensor].nbytes
        for name, experts in by_format.items():
            fmt = get_format(name, self.bundle.levels)
            for tensor in stacks:
                for part, parts in fmt.pool([choices[e].parts[tensor] for e in experts]).items():
                    joined = torch.cat(parts)
                    pieces[packed_name(name, tensor, part)] = joined
                    self.totals.deltas += joined.nbytes
        self._check_room((layer + 1) / info.num_layers)
        for name in sorted(pieces):
            self.digest.update(f"{layer}\0{name}\0".encode() + tensor_hash(pieces[name]))
        self._tensors(added_layer(layer), pieces)

    def _choose(self, planned: PlannedLayer, expert: int, weights: Expert) -> _Choice:
        entries = planned.entries(expert)
        exact = {i: found for i, entry in enumerate(entries) if (found := planned.exact(entry)) is not None}
        like = nearest(weights, iter(exact.items()))
        if like is not None and like[1] == 1.0:
            for i, other in exact.items():
                if all(same_bits(weight, other[name]) for name, weight in weights.items()):
                    return _Choice(entries[i])
        bases = {entry.table: planned.stored_base(entry.table) for entry in entries if entry.table >= 0}
        stored = {index: base for index, base in bases.items() if base is not None}
        if self.bits is not None and bases:
            index = next(iter(stored or bases))
            if stored:
                near = nearest(weights, iter(stored.items()))
                assert near is not None
                index = near[0]
            fmt = get_format(f"d{self.bits}", self.bundle.levels)
            base = planned.base(index)
            return _Choice(None, index, fmt, {n: fmt.encode_delta(w, base[n]) for n, w in weights.items()})
        near = nearest(weights, iter(stored.items()))
        if near is not None and near[1] > 0:
            base = stored[near[0]]
            size = sum(exact_bytes(tuple(w.shape), int(changed(w, base[n]).sum()), w.dtype) for n, w in weights.items())
            if size < _WORTH * sum(weight.nbytes for weight in weights.values()):
                return _Choice(None, near[0], EXACT, {n: encode_exact(w, base[n]) for n, w in weights.items()})
        return _Choice()

    def _check_room(self, done: float) -> None:
        if self.free_bytes is None or self.totals.total <= self.free_bytes:
            return
        needed = self.totals.nonexperts + (self.totals.experts + self.totals.deltas) / max(done, 1e-9)
        kind = "without loss" if self.bits is None else f"in {self.bits} bits"
        raise PlanError(
            f"{self.checkpoint.name} needs about {format_bytes(needed)} on the device {kind}, "
            f"{format_bytes(max(0, self.free_bytes))} are free for added variants. Remove another variant, give fewer "
            "bits, or restart the server with a larger --headroom."
        )

    def _check_finite(self, name: str, weight: Tensor) -> None:
        if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{self.checkpoint.name}: {self.checkpoint.path}: {name} has NaN or infinite weights; save or download "
                "it again."
            )

    def _tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with open_tensors(self.folder, file, declared, self.files) as output:
            for name in output.names:
                output.append(name, tensors[name])

    def _side_files(self) -> bool:
        """Copy the variant's small files. Returns whether it has a tokenizer."""
        copied = side_files(self.checkpoint.path)
        for file in copied:
            data = (self.checkpoint.path / file).read_bytes()
            path = self.folder / ADDED_VARIANT / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as output:
                output.write(data)
                output.flush()
                os.fsync(output.fileno())
            sha256 = hashlib.sha256(data).hexdigest()
            self.files.append(FileRecord(f"{ADDED_VARIANT}/{file.as_posix()}", len(data), sha256))
            self.digest.update(f"{file.as_posix()}\0{sha256}".encode())
        return any(Path(file) in copied for file in TOKENIZER_FILES)
