"""Write a plan with its weights. Holds one expert tensor of one layer V times at most; the folder appears at once."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor

import polymoe
from polymoe.config import format_bytes
from polymoe.errors import PlanError
from polymoe.offline.atomic import check_target, new_folder
from polymoe.offline.bundle import Bundle
from polymoe.offline.family import Family, max_model_len
from polymoe.offline.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SHARED,
    TABLES,
    FileRecord,
    Manifest,
    VariantRecord,
    encode_manifest,
    host_file,
    own_file,
    resident_file,
    variant_folder,
)
from polymoe.offline.plan import PhysicalLayout, Plan, lay_out
from polymoe.offline.progress import byte_progress
from polymoe.offline.scan import FamilyScan
from polymoe.offline.source import side_files
from polymoe.offline.tensorfile import TensorFileWriter

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SPARE_BYTES = 4 << 20  # headers, manifest, folders


def write_bundle(
    family: Family,
    scan: FamilyScan,
    plan: Plan,
    out: str | Path,
    overwrite: bool = False,
    console: Console | None = None,
) -> Bundle:
    """Write the bundle folder `out` and open it.

    Atomic: until the end `out` is what it was, also when the process is killed. Raises `PlanError` when `out` exists
    and `overwrite` is not set, when the disk has too little room or cannot be written; `CheckpointError` when a
    checkpoint can no longer be read.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))  # noqa: PTH100 - resolve() would follow a link to the target
    check_target(target, overwrite)
    plan.check_integrity()
    writer = _Writer(family, scan, plan)
    writer.check_disk(target)
    with (
        new_folder(target, overwrite) as folder,
        byte_progress("Writing", writer.weight_bytes, console) as advance,
    ):
        writer.write(folder, advance)
    return Bundle.open(target)


class _Writer:
    """The files of one bundle, in the order of `write`."""

    def __init__(self, family: Family, scan: FamilyScan, plan: Plan) -> None:
        self.family, self.scan, self.plan = family, scan, plan
        self.layout: PhysicalLayout = lay_out(plan)
        self.files: list[FileRecord] = []
        versions = scan.nonexpert_version
        self.shared = [name for name, sources in versions.items() if len(set(sources)) == 1]
        self.own = {
            v: [name for name, sources in versions.items() if len(set(sources)) > 1 and v in sources]
            for v in range(len(family.names))
        }
        self.resident_bytes = {
            "resident_experts": scan.expert_bytes * sum(len(layer) for layer in self.layout.resident),
            "nonexperts_shared": sum(scan.nonexpert_bytes[name][0] for name in self.shared),
            "nonexperts_own": sum(scan.nonexpert_bytes[name][v] for v, names in self.own.items() for name in names),
            "tables": scan.table_bytes,
        }
        self.host_bytes = scan.expert_bytes * sum(len(layer) for layer in self.layout.host)

    @property
    def weight_bytes(self) -> int:
        return sum(self.resident_bytes.values()) + self.host_bytes

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

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        for name in ("experts", "host", "nonexperts", "variants"):
            (folder / name).mkdir()
        self._tensors(folder, TABLES, {"table": torch.from_numpy(self.layout.table)}, advance)
        for layer in range(self.family.architecture.num_layers):
            self._expert_layer(folder, layer, advance)
        self._nonexperts(folder, SHARED, 0, self.shared, advance)
        for variant, names in self.own.items():
            self._nonexperts(folder, own_file(self.family.names[variant]), variant, names, advance)
        records = [self._variant(folder, variant) for variant in range(len(self.family.names))]
        # Last: a folder with a manifest is whole.
        _write_synced(folder / MANIFEST, encode_manifest(self._manifest(records)))

    def _expert_layer(self, folder: Path, layer: int, advance: Callable[[int], None]) -> None:
        """Both tiers of one layer, tensor by tensor, so that each stored tensor is read once."""
        info, variants = self.family.architecture, self.family.checkpoints
        resident, host = self.layout.resident[layer], self.layout.host[layer]
        dtypes = {tensor: variants[0].dtype(info.expert_tensor(layer, tensor)) for tensor in info.expert_shapes}
        stacks = {t: (dtypes[t], (len(resident), *shape)) for t, shape in info.expert_shapes.items()}
        singles = {
            f"{h}.{t}": (dtypes[t], tuple(shape)) for t, shape in info.expert_shapes.items() for h in range(len(host))
        }
        with (
            _Open(folder, resident_file(layer), stacks) as on_device,
            _Open(folder, host_file(layer), singles) as on_host,
        ):
            for tensor in on_device.file.names:
                used = {owner for owner, _ in (*resident, *host)}
                loaded = {v: variants[v].tensor(info.expert_tensor(layer, tensor)) for v in used}
                for owner, expert in resident:
                    advance(on_device.file.append(tensor, loaded[owner][expert]))
                for h, (owner, expert) in enumerate(host):
                    advance(on_host.file.append(f"{h}.{tensor}", loaded[owner][expert]))
        self.files += [on_device.record(), on_host.record()]

    def _nonexperts(
        self, folder: Path, file: str, variant: int, names: Iterable[str], advance: Callable[[int], None]
    ) -> None:
        checkpoint = self.family.checkpoints[variant]
        declared = {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in names}
        with _Open(folder, file, declared) as output:
            for name in output.file.names:
                advance(output.file.append(name, checkpoint.tensor(name)))
        self.files.append(output.record())

    def _tensors(self, folder: Path, file: str, tensors: dict[str, Tensor], advance: Callable[[int], None]) -> None:
        with _Open(folder, file, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as output:
            for name in output.file.names:
                advance(output.file.append(name, tensors[name]))
        self.files.append(output.record())

    def _variant(self, folder: Path, variant: int) -> VariantRecord:
        """Copy a variant's small files and describe it."""
        checkpoint, name = self.family.checkpoints[variant], self.family.names[variant]
        digest = hashlib.sha256(self.scan.weights_hash(variant, self.plan.serving[variant]).encode())
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
            source_path=str(checkpoint.path),
            source_hash=self.scan.weights_hash(variant),
            max_model_len=max_model_len(checkpoint.config),
            vocab_size=self.family.vocab_sizes[variant],
            dtype=str(checkpoint.dtype(tensor)).removeprefix("torch."),
            has_tokenizer=any(Path(file) in copied for file in _TOKENIZER_FILES),
        )

    def _manifest(self, variants: list[VariantRecord]) -> Manifest:
        info = self.family.architecture
        parameters = info.num_layers * info.num_experts * info.expert_parameters
        return Manifest(
            format_version=FORMAT_VERSION,
            polymoe_version=polymoe.__version__,
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
            nonexperts={name: list(sources) for name, sources in self.scan.nonexpert_version.items()},
            tied=dict(self.family.checkpoints[0].tied),
            resident_experts=[len(layer) for layer in self.layout.resident],
            host_experts=[len(layer) for layer in self.layout.host],
            positions=self.plan.position_counts(),
            resident_bytes=self.resident_bytes,
            host_bytes=self.host_bytes,
            bytes_per_expert_parameter=self.resident_bytes["resident_experts"] / parameters,
            files=self.files,
        )


class _Open:
    """A tensor file while it is written; closed without a check when an exception passes through."""

    def __init__(self, folder: Path, path: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = path
        self.file = TensorFileWriter(folder / path, tensors)

    def __enter__(self) -> "_Open":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._written = self.file.close()
        else:
            self.file.abandon()

    def record(self) -> FileRecord:
        return FileRecord(self.path, self._written.size, self._written.sha256)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
