"""Scales, norms and routers of a bundle replaced by others of the same shape and dtype, all at once or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import safe_open
from torch import Tensor

from polymoe.offline.atomic import new_folder
from polymoe.offline.bundle import Bundle
from polymoe.offline.layer_writer import open_tensors
from polymoe.offline.manifest import FOLDERS, MANIFEST, FileRecord, delta_file, encode_manifest, own_file, packed_name
from polymoe.offline.tensorfile import raw_bytes

ScaleKey = tuple[int, str, str]  # (layer, delta format, tensor)


@dataclass(frozen=True, eq=False)
class Learned:
    """Of one variant. values: `ScaleKey` -> scales [n, out, groups], or the name of a non-expert tensor -> its value.
    rows: `ScaleKey` -> int64 [n], where in the pool the scales belong."""

    values: Mapping[Any, Tensor]
    rows: Mapping[ScaleKey, Tensor]

    def hash(self) -> str:
        """SHA-256 over names and values."""
        digest = hashlib.sha256()
        for key in sorted(self.values, key=str):
            digest.update(f"{key}\0".encode() + raw_bytes(self.values[key]))
        return digest.hexdigest()


def rewrite(bundle: Bundle, learned: Mapping[int, Learned]) -> Bundle:
    """`bundle` with what its variants (by index) learned, in its own place. Files that do not change are linked.

    Raises `PlanError` when the disk is full or cannot be written.
    """
    changes: dict[str, list[tuple[str, Tensor | None, Tensor]]] = {}  # file -> (tensor, rows, values)
    for v, found in learned.items():
        for key, value in found.values.items():
            if isinstance(key, tuple):
                layer, fmt, tensor = key
                change = packed_name(fmt, tensor, "scales"), found.rows[key], value
                changes.setdefault(delta_file(layer), []).append(change)
            else:
                changes.setdefault(own_file(bundle.variants[v].name), []).append((key, None, value))
    variants = [
        msgspec.structs.replace(record, version=_version(record.version, learned[v])) if v in learned else record
        for v, record in enumerate(bundle.variants)
    ]
    with new_folder(bundle.path, overwrite=True) as folder:
        files: list[FileRecord] = []
        for record in bundle.manifest.files:
            (folder / record.path).parent.mkdir(parents=True, exist_ok=True)
            if record.path in changes:
                _rewrite_file(bundle.path, folder, record.path, changes[record.path], files)
            else:
                _link(bundle.path / record.path, folder / record.path)
                files.append(record)
        for name in FOLDERS:
            (folder / name).mkdir(exist_ok=True)
        manifest = msgspec.structs.replace(bundle.manifest, variants=variants, files=files)
        with (folder / MANIFEST).open("xb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
    return Bundle.open(bundle.path)


def _rewrite_file(
    source: Path, folder: Path, path: str, changes: list[tuple[str, Tensor | None, Tensor]], files: list[FileRecord]
) -> None:
    with safe_open(source / path, framework="pt", device="cpu") as old:
        tensors = {name: old.get_tensor(name).clone() for name in old.keys()}  # noqa: SIM118 - it is no dict
    for name, rows, value in changes:
        assert value.dtype == tensors[name].dtype, name
        if rows is None:
            assert value.shape == tensors[name].shape, name
            tensors[name] = value
        else:
            tensors[name][rows] = value
    declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with open_tensors(folder, path, declared, files) as output:
        for name in output.names:
            output.append(name, tensors[name])


def _version(version: str, learned: Learned) -> str:
    return hashlib.sha256(f"{version}\0{learned.hash()}".encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
