"""Write a plan with its weights. Holds one expert tensor of one layer V times at most, and what is packed of the layer;
the folder appears at once."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from polymoe.bundle.atomic import check_target, new_folder
from polymoe.bundle.manifest import (
    FOLDERS,
    FORMAT_VERSION,
    MANIFEST,
    TABLES,
    FileRecord,
    Manifest,
    VariantRecord,
    WeightBytes,
    encode_manifest,
    variant_folder,
)
from polymoe.bundle.reader import Bundle
from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family, max_model_len
from polymoe.offline.checkpoint.matrices import is_transposed
from polymoe.offline.checkpoint.source import TOKENIZER_FILES, side_files
from polymoe.offline.encode.encode import make_encoder
from polymoe.offline.encode.encoded_layer import EncodedLayer
from polymoe.offline.plan.layout import PhysicalLayout, lay_out
from polymoe.offline.plan.plan import Plan
from polymoe.offline.plan.sizes import ExpertSizes, plan_bytes
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.offline.write.layer_writer import LayerWriter, open_tensors
from polymoe.offline.write.nonexpert_writer import NonexpertWriter
from polymoe.progress import byte_progress
from polymoe.quant.formats import GRID_LEVELS
from polymoe.version import __version__

_SPARE_BYTES = 4 << 20  # headers, manifest, folders


def write_bundle(
    family: Family,
    scan: FamilyScan,
    plan: Plan,
    out: str | Path,
    overwrite: bool = False,
    console: Console | None = None,
    calibration: Calibration | None = None,
) -> Bundle:
    """Write the bundle folder `out` and open it. `calibration`: what merges, scales and deltas are fitted to.

    Atomic: until the end `out` is what it was, also when the process is killed. Raises `PlanError` when `out` exists
    and `overwrite` is not set, when the disk has too little room or cannot be written; `CheckpointError` when a
    checkpoint can no longer be read.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))  # noqa: PTH100 - resolve() would follow a link to the target
    check_target(target, overwrite)
    plan = plan.with_shared_deltas(scan.expert_same_as)
    plan.check_integrity()
    writer = _Writer(family, scan, plan)
    writer.check_disk(target)
    with (
        new_folder(target, overwrite) as folder,
        byte_progress("Writing", writer.weight_bytes, console) as advance,
    ):
        writer.write(folder, advance, calibration, console)
    return Bundle.open(target)


class _Writer:
    """The files of one bundle, in the order of `write`."""

    def __init__(self, family: Family, scan: FamilyScan, plan: Plan) -> None:
        self.family, self.scan, self.plan = family, scan, plan
        self.layout: PhysicalLayout = lay_out(plan)
        self.files: list[FileRecord] = []
        sizes = ExpertSizes.of(family)
        self.layers = LayerWriter(family, plan, self.layout, is_transposed(family))
        self.base_bytes, self.delta_bytes = plan_bytes(self.layout, sizes)  # an upper bound where deltas are exact
        self.nonexperts = NonexpertWriter(family, scan, plan)
        self.host_bytes = scan.expert_bytes * sum(len(layer) for layer in self.layout.host)

    @property
    def weight_bytes(self) -> int:
        packed = self.base_bytes + self.delta_bytes + self.layout.table_bytes
        return packed + self.nonexperts.shared_bytes + self.nonexperts.own_bytes + self.host_bytes

    def check_disk(self, target: Path) -> None:
        """Raise `PlanError` when the disk of `target` has less room than the bundle needs."""
        parent = next(path for path in target.parents if path.exists())
        side = sum((c.path / file).stat().st_size for c in self.family.checkpoints for file in side_files(c.path))
        needed, free = self.weight_bytes + side + _SPARE_BYTES, shutil.disk_usage(parent).free
        if needed > free:
            raise PlanError(
                f"the bundle needs {format_bytes(needed)} on the disk of {parent}, {format_bytes(free)} are free; "
                "free some space or choose another --out."
            )

    def write(
        self, folder: Path, advance: Callable[[int], None], calibration: Calibration | None, console: Console | None
    ) -> None:
        for name in FOLDERS:
            (folder / name).mkdir()
        self._tensors(folder, TABLES, self._tables(), advance)
        self.encoder = make_encoder(self.family, self.scan, self.plan, calibration, console) if self._packs else None
        for layer in range(self.family.architecture.num_layers):
            self._expert_layer(folder, layer, advance)
        self.files += self.layers.files
        self.nonexperts.write(folder, advance)
        self.files += self.nonexperts.files
        records = [self._variant(folder, variant) for variant in range(len(self.family.names))]
        # Last: a folder with a manifest is whole.
        _write_synced(folder / MANIFEST, encode_manifest(self._manifest(records)))

    def _tables(self) -> dict[str, Tensor]:
        tables = {"table": torch.from_numpy(self.layout.table)}
        if any(self.layout.deltas):
            tables["delta"] = torch.from_numpy(self.layout.delta)
        if self.layout.sign is not None:
            tables["sign"] = torch.from_numpy(self.layout.sign)
        return tables

    @property
    def _packs(self) -> bool:
        """Whether anything is not a checkpoint's expert verbatim."""
        positions = np.argwhere(self.plan.resident.any(axis=0))
        return any(self.layout.deltas) or not all(self.plan.is_verbatim(*position) for position in positions)

    def _expert_layer(self, folder: Path, layer: int, advance: Callable[[int], None]) -> None:
        self.layers.write(folder, layer, self.encoder.layer(layer) if self.encoder else EncodedLayer(), advance)

    def _tensors(self, folder: Path, file: str, tensors: dict[str, Tensor], advance: Callable[[int], None]) -> None:
        declared = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        with open_tensors(folder, file, declared, self.files) as output:
            for name in output.names:
                advance(output.append(name, tensors[name]))

    def _variant(self, folder: Path, variant: int) -> VariantRecord:
        """Copy a variant's small files and describe it."""
        checkpoint, name = self.family.checkpoints[variant], self.family.names[variant]
        served = self.scan.weights_hash(variant, self.plan.serving[variant], self._packed_hashes(variant))
        digest = hashlib.sha256(served.encode() + self.nonexperts.hash(variant))
        copied = side_files(checkpoint.path)
        for file in copied:
            data = (checkpoint.path / file).read_bytes()
            path = folder / variant_folder(name) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(path, data)
            sha256 = hashlib.sha256(data).hexdigest()
            self.files.append(FileRecord(path.relative_to(folder).as_posix(), len(data), sha256))
            digest.update(f"{file.as_posix()}\0{sha256}".encode())
        info = self.family.architecture
        tensor = info.expert_tensor(0, next(iter(info.expert_shapes)))
        return VariantRecord(
            name=name,
            version=digest.hexdigest(),
            source=checkpoint.spec,
            source_path=str(checkpoint.place),
            source_hash=self.scan.weights_hash(variant),
            max_model_len=max_model_len(checkpoint.config),
            vocab_size=self.family.vocab_sizes[variant],
            dtype=str(checkpoint.dtype(tensor)).removeprefix("torch."),
            has_tokenizer=any(Path(file) in copied for file in TOKENIZER_FILES),
            predicted_error=None if self.plan.predicted_error is None else float(self.plan.predicted_error[variant]),
        )

    def _packed_hashes(self, variant: int) -> dict[tuple[int, int], bytes]:
        """(layer, expert) -> SHA-256 of what serves the variant where that is not a checkpoint's expert verbatim."""
        plan, hashes, signs, found = self.plan, self.layers.hashes, self.plan.sign, {}
        for layer, expert in np.ndindex(*plan.serving.shape[1:]):
            leader, owner = int(plan.serving[variant, layer, expert]), int(plan.delta_owner[variant, layer, expert])
            if not plan.resident[variant, layer, expert] or (plan.is_verbatim(layer, expert) and owner < 0):
                continue
            base = hashes.get((layer, leader, expert, "base"), self.scan.expert_hash[leader, layer, expert].tobytes())
            digest = hashlib.sha256(f"{plan.base[layer, expert]}\0".encode() + base)
            if owner >= 0:
                sign = int(signs[variant, layer, expert])
                digest.update(f"{plan.delta_format(layer, expert)}\0{sign}\0".encode())
                digest.update(hashes[layer, owner, expert, "delta"])
            found[layer, expert] = digest.digest()
        return found

    def _manifest(self, variants: list[VariantRecord]) -> Manifest:
        info = self.family.architecture
        parameters = info.num_layers * info.num_experts * info.expert_parameters
        base_bytes, delta_bytes = self.layers.base_bytes, self.layers.delta_bytes
        planned = self.base_bytes, self.delta_bytes
        same = base_bytes == planned[0] and (self.layout.has_lossless_deltas or delta_bytes == planned[1])
        errors = self.plan.position_error
        assert same, f"{base_bytes} + {delta_bytes} bytes were written, {planned[0]} + {planned[1]} planned"
        return Manifest(
            format_version=FORMAT_VERSION,
            levels=GRID_LEVELS,
            polymoe_version=__version__,
            transformers_version=transformers.__version__,
            policy=self.plan.policy,
            memory=self.plan.memory,
            model_type=info.model_type,
            architecture=info.class_name,
            variants=variants,
            expert_modules=list(info.expert_modules),
            num_experts=info.num_experts,
            expert_shapes={name: list(shape) for name, shape in info.expert_shapes.items()},
            expert_bytes=self.scan.expert_bytes,
            expert_parameters=info.expert_parameters,
            nonexperts={name: list(sources) for name, sources in self.scan.nonexpert_same_as.items()},
            packed_nonexperts=self.nonexperts.packed,
            tied=dict(self.family.checkpoints[0].tied),
            transposed=self.layers.transposed,
            base_pools=[{name: len(pool) for name, pool in pools.items()} for pools in self.layout.bases],
            delta_pools=[{name: len(pool) for name, pool in pools.items()} for pools in self.layout.deltas],
            host_experts=[len(layer) for layer in self.layout.host],
            positions=self.plan.position_counts(),
            resident_bytes=WeightBytes(
                resident_experts=base_bytes,
                deltas=delta_bytes,
                nonexperts_shared=self.nonexperts.shared_bytes,
                nonexperts_own=self.nonexperts.own_bytes,
                tables=self.layout.table_bytes,
            ),
            host_bytes=self.host_bytes,
            bytes_per_expert_parameter=(base_bytes + delta_bytes) / parameters,
            files=self.files,
            dial=list(self.plan.dial),
            dial_of="all" if self.plan.dial_of_all else "experts",
            position_errors=[] if errors is None else [[float(f"{e:.3g}") for e in layer] for layer in errors],
        )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
