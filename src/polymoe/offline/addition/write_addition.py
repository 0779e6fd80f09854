"""Plan what a new variant needs beside what is served, and write only that.

An expert that a planned variant has too, bit for bit, is shared. Of another one the changed values are stored where
that is less than the expert; else the expert itself. Both are lossless. With `bits` a correction of so many bits is
stored instead, against the base that is there. Tensors outside the experts are shared likewise, or stored; corrections
are for those that the bundle has in few bits.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bundle.live import (
    ADDED_NONEXPERTS,
    ADDED_TABLES,
    ADDED_VARIANT,
    AddedDelta,
    Addition,
    added_folder,
    added_layer,
)
from polymoe.bundle.manifest import FileRecord
from polymoe.bundle.reader import Bundle
from polymoe.config import format_bytes
from polymoe.errors import PlanError
from polymoe.offline.addition.layer_plan import LayerPlan, LayerPlanner
from polymoe.offline.addition.new_variant import NewVariant
from polymoe.offline.addition.nonexpert_plan import NonexpertChoice, NonexpertPlanner
from polymoe.offline.checkpoint.configs import max_model_len
from polymoe.offline.checkpoint.source import TOKENIZER_FILES, side_files
from polymoe.offline.write.layer_writer import open_tensors
from polymoe.thread_pool import thread_pool

Progress = Callable[[str, float], None]


class NoRoomError(PlanError):
    """It does not fit what is free on the device; in fewer bits it may."""


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

    Raises: `NoRoomError` where it does not fit, `CheckpointError` for weights that cannot be read or are not finite,
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
        self.writing: ThreadPoolExecutor
        self.written: Future[None] = Future()  # of the last file
        self.written.set_result(None)
        self.own_experts: list[int] = []
        self.deltas: list[dict[str, int]] = []
        self.packed: dict[str, AddedDelta] = {}
        # What it builds on is a part of what it is.
        for record in bundle.manifest.files:
            if record.path.startswith(("experts/", "deltas/", "nonexperts/")):
                self.digest.update(f"{record.path}\0{record.sha256}".encode())

    def write(self) -> tuple[Addition, list[FileRecord]]:
        # Files are written, hashed and synced to the disk beside the layers that are planned.
        with thread_pool() as pool, ThreadPoolExecutor(1) as self.writing:
            nonexperts = self._nonexperts(pool)
            layers = LayerPlanner(self.bundle, self.checkpoint, self.bits).in_order(pool)
            for layer, found in enumerate(layers):
                self.progress("comparing and encoding", layer / self.info.num_layers)
                self._add(layer, found)
            self._tensors(ADDED_TABLES, {"table": [self.table], "delta": [self.delta], "sign": [self.sign]})
            has_tokenizer = self._side_files()
            self.written.result()
        for record in sorted(self.files, key=lambda record: record.path):
            self.digest.update(f"{record.path}\0{record.sha256}".encode())
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
            packed=self.packed,
            shared_experts=self.totals.shared,
        )
        self.progress("comparing and encoding", 1.0)
        return addition, [FileRecord(f"{prefix}/{r.path}", r.size, r.sha256) for r in self.files]

    def _nonexperts(self, pool: ThreadPoolExecutor) -> dict[str, int]:
        """Name -> the planned variant with the same tensor, or `OWN`; own ones are written."""
        found: dict[str, NonexpertChoice] = {}
        own: dict[str, list[Tensor]] = {}
        names = sorted(self.info.nonexperts)
        planner = NonexpertPlanner(self.bundle, self.checkpoint, self.bits)
        for done, (name, choice) in enumerate(zip(names, pool.map(planner.plan, names), strict=True)):
            self.progress("comparing what is no expert", done / len(names))
            found[name] = choice
            self.digest.update(f"{name}\0{choice.source if not choice.tensors else 'own'}\0".encode())
            own |= {stored_as: [tensor] for stored_as, tensor in choice.tensors.items()}
            if choice.delta is not None:
                self.packed[name] = choice.delta
                self.digest.update(f"{choice.delta.base}\0".encode())
            self.totals.nonexperts += choice.num_bytes
        self._check_room(0.0)
        self._tensors(ADDED_NONEXPERTS, own)
        return {name: found[name].source for name in self.bundle.manifest.nonexperts}

    def _add(self, layer: int, found: LayerPlan) -> None:
        """Put a layer into the tables, and what is stored for it into its file."""
        bases = self.bundle.manifest.resident_experts[layer]
        for expert, choice in enumerate(found.choices):
            if (entry := choice.entry) is not None:
                self.table[layer, expert], self.delta[layer, expert] = entry.table, entry.delta
                self.sign[layer, expert] = entry.sign
                self.totals.shared += 1
        for place, expert in enumerate(found.own):
            self.table[layer, expert] = bases + place
        place = sum(self.bundle.manifest.delta_pools[layer].values())
        for experts in found.by_format.values():
            for expert in experts:
                self.table[layer, expert], self.delta[layer, expert] = found.choices[expert].base, place
                place += 1
        self.own_experts.append(len(found.own))
        self.deltas.append({name: len(experts) for name, experts in found.by_format.items()})
        self.totals.experts += found.expert_bytes
        self.totals.deltas += found.delta_bytes
        self._check_room((layer + 1) / self.info.num_layers)
        self._tensors(added_layer(layer), found.pieces)

    def _check_room(self, done: float) -> None:
        if self.free_bytes is None or self.totals.total <= self.free_bytes:
            return
        needed = self.totals.nonexperts + (self.totals.experts + self.totals.deltas) / max(done, 1e-9)
        kind = "without loss" if self.bits is None else f"in {self.bits} bits"
        raise NoRoomError(
            f"{self.checkpoint.name} needs about {format_bytes(needed)} on the device {kind}, "
            f"{format_bytes(max(0, self.free_bytes))} are free for added variants. Remove another variant, give fewer "
            "bits, or restart the server with a larger --headroom."
        )

    def _tensors(self, file: str, tensors: Mapping[str, list[Tensor]]) -> None:
        """Write a file; the one before is complete then, so that no more than two are held."""
        declared = {
            name: (pieces[0].dtype, (sum(len(piece) for piece in pieces), *pieces[0].shape[1:]))
            for name, pieces in tensors.items()
        }

        def write() -> None:
            with open_tensors(self.folder, file, declared, self.files) as output:
                for name in output.names:
                    for piece in tensors[name]:
                        output.append(name, piece)

        self.written.result()
        self.written = self.writing.submit(write)

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
