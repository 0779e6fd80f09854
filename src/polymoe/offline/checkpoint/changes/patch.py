"""A patch: the values of a checkpoint that training changed, as RL trainers send them.

A safetensors file. For each changed tensor NAME of the checkpoint, under the name that the base stores it by (of a
quantised base: that of the weight, in the dtype it is read in) or the stock model's:

    NAME.indices  int32 or int64 [n]  flat places, each once
    NAME.values   [n]                 the new values, in the base's dtype
    NAME.shape    int64 [dimensions]  of the whole tensor
    NAME.sha256   uint8 [32]          of the base tensor's bytes (optional): the patch fits no other base
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bundle.tensor_file import dtype_name, raw_bytes, read_header
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.changes.edit import Edit
from polymoe.offline.checkpoint.source_tensor import TensorFiles

_PARTS = ("indices", "values", "shape", "sha256")


def read_patch(path: Path) -> dict[str, Edit]:
    """Name -> what to change there. Raises `CheckpointError` for a file that is no patch."""
    files = TensorFiles({name: (path, entry) for name, entry in read_header(path).items()})
    edits: dict[str, Edit] = {}
    for part in files.entries:
        name, _, leaf = part.rpartition(".")
        missing = [other for other in _PARTS[:3] if f"{name}.{other}" not in files.entries]
        if leaf not in _PARTS or missing:
            raise CheckpointError(
                f"{path}: {part} belongs to no patch; each changed tensor NAME has NAME.indices, NAME.values and "
                "NAME.shape."
            )
        if leaf == "values":
            edits[name] = _edit(path, name, files)
    return edits


def _edit(path: Path, name: str, files: TensorFiles) -> Edit:
    shape = torch.Size(files.load(f"{name}.shape").tolist())
    indices, values = (files.entries[f"{name}.{leaf}"] for leaf in ("indices", "values"))
    if indices.dtype not in (torch.int32, torch.int64) or len(indices.shape) != 1 or indices.shape != values.shape:
        raise CheckpointError(
            f"{path}: {name}.indices is {indices.dtype_name} {list(indices.shape)} and {name}.values "
            f"{list(values.shape)}; they must be int32 or int64 [n] and [n]."
        )

    def apply(tensor: Tensor) -> Tensor:
        if values.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name}.values is {values.dtype_name}, the base's tensor {dtype_name(tensor.dtype)}; write "
                "the patch in the base's dtype."
            )
        if f"{name}.sha256" in files.entries:
            stated = bytes(files.load(f"{name}.sha256").tolist())
            if hashlib.sha256(raw_bytes(tensor)).digest() != stated:
                raise CheckpointError(f"{path}: {name} was changed in another base than this one; give that one.")
        places = files.load(f"{name}.indices").long()
        if len(places) and (int(places.min()) < 0 or int(places.max()) >= shape.numel()):
            raise CheckpointError(f"{path}: {name}.indices has places outside {list(shape)}.")
        ascending = bool((places.diff() > 0).all())  # as most are written: sorting takes longer than all the rest
        if not ascending and bool((places.sort().values.diff() == 0).any()):
            raise CheckpointError(f"{path}: {name}.indices names a place twice.")
        changed = tensor.flatten().clone()
        changed[places] = files.load(f"{name}.values")
        return changed.reshape(shape)

    return Edit(str(path), tuple(shape), apply)
