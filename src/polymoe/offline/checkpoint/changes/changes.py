"""Adapters and patches of a variant, laid over the tensors of its base."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from polymoe.bundle.plain_files import why_not_to_read
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.changes.adapter import CONFIG, read_adapter
from polymoe.offline.checkpoint.changes.edit import Edit
from polymoe.offline.checkpoint.changes.patch import read_patch
from polymoe.offline.checkpoint.names import NameMap
from polymoe.offline.checkpoint.source import some
from polymoe.offline.checkpoint.source_tensor import Load, Make


def apply_changes(names: NameMap, paths: Iterable[Path]) -> list[str]:
    """From now on `names` reads the changed tensors. Returns notes on what was left out.

    Raises `CheckpointError` for a change that is damaged, or that fits no tensor of the base.
    """
    notes = []
    for path in paths:
        edits = _read(path, names)
        nowhere = [name for name, edit in edits.items() if not _place(names, name, edit)]
        unread = [name for name in nowhere if name in names.tensors]
        if strange := sorted(set(nowhere) - set(unread)):
            raise CheckpointError(
                f"{path}: it changes {some(strange)}, which the base does not have. Is it a change of this model?"
            )
        if unread:
            notes.append(f"{path.name} also changes what is left out: {some(sorted(unread))}; {len(unread)} in all")
    return notes


def _read(path: Path, names: NameMap) -> dict[str, Edit]:
    if path.is_dir() and (path / CONFIG).exists():
        return read_adapter(path, names.model)
    file = path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1 or (path / "config.json").exists():
            raise CheckpointError(
                f"{path} is neither an adapter ({CONFIG}) nor a patch (one .safetensors file). One of the two is "
                "expected after BASE+; a whole checkpoint is a variant by itself."
            )
        (file,) = found
    if reason := why_not_to_read(file, file.parent):
        raise CheckpointError(f"{file} {reason}.")
    return read_patch(file)


def _place(names: NameMap, name: str, edit: Edit) -> bool:
    """Whether there is a tensor of that name which the model reads; it is changed then."""
    if name in names.tensors:
        target = names.target_of(name)
        if target is None:
            return False
        if target in names.edits:
            raise CheckpointError(
                f"{edit.path}: {name} is changed, and {target}, which it becomes a part of, was changed before; put "
                "this change first, or merge them."
            )
        tensor = names.tensors[name]
        _check(name, tensor.shape, edit)
        names.tensors[name] = replace(tensor, make=_then(tensor.make, edit))
        return True
    if name in names.targets:
        _check(name, names.targets[name].shape, edit)
        names.edits.setdefault(name, []).append(edit.apply)
        return True
    return _place_by_rules(names, name, edit)


def _place_by_rules(names: NameMap, name: str, edit: Edit) -> bool:
    """An older name: of a renamed tensor, or of one expert of a stack."""
    target, pattern = names.rename(name)
    if target not in names.targets:
        return False
    if pattern is None:
        return _place(names, target, edit) if target != name else False
    row = names.row_of(name, target, pattern)
    if row is None:
        return False
    expert, part, parts = row
    _, size, *rest = names.targets[target].shape
    _check(name, (size // parts, *rest), edit)
    piece = slice(part * (size // parts), (part + 1) * (size // parts))

    def apply(stack: Tensor) -> Tensor:
        changed = stack.clone()
        changed[expert, piece] = edit.apply(stack[expert, piece])
        return changed

    names.edits.setdefault(target, []).append(apply)
    return True


def _check(name: str, shape: tuple[int, ...], edit: Edit) -> None:
    if tuple(shape) != tuple(edit.shape):
        raise CheckpointError(
            f"{edit.path}: it changes {name} of shape {list(edit.shape)}, the base has {list(shape)}. Is it a change "
            "of this model?"
        )


def _then(make: Make, edit: Edit) -> Make:
    def made(load: Load) -> Tensor:
        return edit.apply(make(load))

    return made
