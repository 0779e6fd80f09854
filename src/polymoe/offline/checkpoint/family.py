"""Several checkpoints that can be served together: one architecture, one vocabulary, one way to compute."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from polymoe.bundle.manifest import VARIANT_NAME
from polymoe.errors import FamilyError, named
from polymoe.model.stock.probe import trace
from polymoe.model.stock.skeleton import float32_weights
from polymoe.offline.checkpoint.architecture import ArchitectureInfo
from polymoe.offline.checkpoint.cast import short
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.configs import check_same_model, max_model_len, unknown_keys
from polymoe.offline.checkpoint.source import some
from polymoe.offline.checkpoint.vocabulary import check_vocabularies

_FEW_ROWS = 16  # a matrix with fewer outputs is a gate, or not worth packing

__all__ = ["Family", "max_model_len", "parse_variant_specs"]


def parse_variant_specs(specs: Sequence[str]) -> dict[str, str]:
    """["code=path", "math=org/model"] -> {"code": "path", "math": "org/model"}, in order.

    Raises `FamilyError` for a missing `=`, an empty part, a bad name or one given twice.
    """
    parsed: dict[str, str] = {}
    for text in specs:
        name, equals, spec = text.partition("=")
        if not equals or not spec:
            raise FamilyError(f"{text!r} is not NAME=PATH, NAME=org/model[@revision] or NAME=BASE+CHANGE.")
        if name in parsed:
            raise FamilyError(f"the name {name} is given twice; every variant needs its own.")
        parsed[name] = spec
    _check_names(list(parsed))
    return parsed


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not VARIANT_NAME.fullmatch(name):
            raise FamilyError(
                f"{name!r} is not a variant name: 1 to 64 letters, digits, '.', '_', '-', and first a letter or digit."
            )
    folded = [name.casefold() for name in names]
    for index, name in enumerate(names):
        if folded.index(folded[index]) != index:
            # Names become folders, which some file systems do not tell apart by case.
            raise FamilyError(f"the names {names[folded.index(folded[index])]} and {name} differ only in case.")


class Family:
    """Checked variants, in the order given. `config`, `architecture` and dtypes are the first variant's.

    `packable`: the non-experts that may be stored in fewer bits.
    `notes`: what a user should know about the variants before their weights are read, one line each.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        if not checkpoints:
            raise FamilyError("a family needs at least one checkpoint; give NAME=PATH.")
        self.names = tuple(checkpoint.name for checkpoint in checkpoints)
        _check_names(self.names)
        for other in checkpoints[1:]:
            check_same_model(checkpoints[0], other)
        self.notes = [f"{c.name}: {note}." for c in checkpoints for note in (*c.notes, *_config_notes(c))]
        checkpoints = self._with_one_head(checkpoints)
        self.config = checkpoints[0].config
        self.vocab_sizes = tuple(int(c.config.get_text_config().vocab_size) for c in checkpoints)
        check_vocabularies(list(self.names), [c.path for c in checkpoints], list(self.vocab_sizes))
        _check_tensors(checkpoints)
        self.checkpoints = self._in_one_dtype(checkpoints)
        with named(self.names[0], checkpoints[0].path):
            trial = trace(self.config)  # what cannot be served is refused now, not when a bundle is loaded
        self.packable = tuple(name for name in self.architecture.nonexperts if self._is_packable(name, trial.products))

    @classmethod
    def open(cls, specs: Mapping[str, str | Path] | Sequence[str]) -> Self:
        """Open `{name: folder or Hub model}` or `["NAME=SPEC", …]`.

        Raises `CheckpointError` for one that cannot be read, `UnsupportedModelError` for a model that cannot be served,
        `FamilyError` when they do not belong together.
        """
        named = dict(specs) if isinstance(specs, Mapping) else dict(parse_variant_specs(specs))
        _check_names(list(named))
        return cls([Checkpoint.open(spec, name) for name, spec in named.items()])

    def _with_one_head(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Heads that are tied to the embedding are untied where another variant's is not: one model has one way."""
        if all(c.tied for c in checkpoints) or not any(c.tied for c in checkpoints):
            return checkpoints
        free = ", ".join(c.name for c in checkpoints if not c.tied)
        self.notes += [
            f"{c.name}: its output head is tied to its embedding; it is served with a copy, since {free} has its own."
            for c in checkpoints
            if c.tied
        ]
        return [c.untied() for c in checkpoints]

    def _in_one_dtype(self, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        found = []
        for checkpoint in checkpoints:
            casts = _casts(checkpoints[0], checkpoint)
            if casts:
                self.notes.append(f"{checkpoint.name}: {_cast_note(checkpoints[0], checkpoint, casts)}.")
            found.append(checkpoint.cast(casts) if casts else checkpoint)
        return tuple(found)

    @property
    def rounding_notes(self) -> list[str]:
        """What the casts of dtypes did to the weights that were read; whole after a scan."""
        first, notes = self.names[0], []
        for checkpoint in self.checkpoints:
            name, rounding = checkpoint.name, checkpoint.rounding
            if rounding.share:
                way_out = f"name it before {first}" if name != first else "save it in one dtype"
                share = f"{rounding.share:.1%}" if rounding.share >= 0.001 else "less than 0.1%"
                notes.append(
                    f"{name}: the cast rounded {share} of the values; `separate` is exact for the rounded "
                    f"weights. To keep them, {way_out}, at the bytes of the wider dtype."
                )
            elif rounding.counts:
                notes.append(f"{name}: the cast lost nothing.")
        return notes

    def _is_packable(self, name: str, products: frozenset[str]) -> bool:
        """Whether a non-expert may be stored in fewer bits: matrices of one shape, and of the experts' dtype, that
        tokens are multiplied by or looked up in, but for routers and gates: their errors send tokens elsewhere."""
        first, info = self.checkpoints[0], self.architecture
        dtype = first.dtype(info.expert_tensor(0, next(iter(info.expert_shapes))))
        if name not in products or first.dtype(name) != dtype:
            return False
        if any(c.shape(name) != first.shape(name) or c.dtype(name) != first.dtype(name) for c in self.checkpoints):
            return False
        rows = first.shape(name)[0]
        beside = any(name.startswith(path.rpartition(".")[0] + ".") for path in info.expert_modules)
        return rows >= _FEW_ROWS and not (beside and rows == info.num_experts)

    @property
    def architecture(self) -> ArchitectureInfo:
        return self.checkpoints[0].architecture

    @property
    def vocab_size(self) -> int:
        """Rows of the largest vocabulary."""
        return max(self.vocab_sizes)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored."""
        first, info = self.checkpoints[0], self.architecture
        return sum(first.num_bytes(info.expert_tensor(0, tensor)) for tensor in info.expert_shapes) // info.num_experts

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of all variants."""
        return sum(c.num_bytes(target) for c in self.checkpoints for target in c.target_names)


def _config_notes(checkpoint: Checkpoint) -> list[str]:
    unknown = unknown_keys(checkpoint)
    if not unknown:
        return []
    return [f"config.json has keys that {type(checkpoint.config).__name__} does not know: {some(unknown, 12)}"]


def _check_tensors(checkpoints: Sequence[Checkpoint]) -> None:
    first, info = checkpoints[0], checkpoints[0].architecture
    for other in checkpoints[1:]:
        if set(first.target_names) != set(other.target_names):
            odd = sorted(set(first.target_names) ^ set(other.target_names))
            raise FamilyError(
                f"{first.name} and {other.name} have different tensors: {some(odd)} ({first.path}, {other.path}). Are "
                "they fine-tunes of one model?"
            )
        for name in first.target_names:
            # Rows of the vocabulary may differ; the checkpoints' own check tied them to vocab_size already.
            skip = 1 if name in info.vocab_tensors else 0
            if first.shape(name)[skip:] != other.shape(name)[skip:]:
                raise FamilyError(
                    f"{name} has shape {list(first.shape(name))} in {first.name} and {list(other.shape(name))} in "
                    f"{other.name} ({first.path}, {other.path}). Are they fine-tunes of one model?"
                )


def _casts(first: Checkpoint, other: Checkpoint) -> dict[str, torch.dtype]:
    """The targets of `other` that take another dtype than they are stored in.

    Physical experts of all variants lie in one stack a layer, which has one dtype: the one in which the first variant
    stores most of its layers. A variant that has its experts in another dtype was saved in another dtype, and takes
    that of the first for all its tensors but those that transformers computes in float32 all the same; else its
    non-experts stay as they are.
    """
    info = first.architecture
    found: dict[str, torch.dtype] = {}
    for tensor in info.expert_shapes:
        names = [info.expert_tensor(layer, tensor) for layer in range(info.num_layers)]
        dtype = Counter(first.dtype(name) for name in names).most_common(1)[0][0]
        found |= {name: dtype for name in names if other.dtype(name) != dtype}
    if found and other is not first:
        kept = {dtype: float32_weights(first.model, dtype) for dtype in {first.dtype(name) for name in info.nonexperts}}
        for name in info.nonexperts:
            own, dtype = other.dtype(name), first.dtype(name)
            if own.is_floating_point and own != dtype and name not in kept[dtype]:
                found[name] = dtype
    return found


def _cast_note(first: Checkpoint, other: Checkpoint, casts: Mapping[str, torch.dtype]) -> str:
    sizes: dict[tuple[str, str], int] = {}
    for name, dtype in casts.items():
        pair = short(other.dtype(name)), short(dtype)
        sizes[pair] = sizes.get(pair, 0) + 1
    shown = ", ".join(f"{count} tensors from {old} to {new}" for (old, new), count in sizes.items())
    return f"cast to the dtype of the family, which is that of {first.name}: {shown}"
