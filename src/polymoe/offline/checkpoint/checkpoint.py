"""One fine-tuned model on disk, read lazily tensor by tensor under the stock model's parameter names."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from polymoe.bundle.config_checks import load_config
from polymoe.errors import CheckpointError, UnsupportedModelError, named
from polymoe.model.stock.kind import kind_of
from polymoe.offline.checkpoint.architecture import (
    ArchitectureInfo,
    build_on_meta,
    check_supported,
    check_supported_config,
)
from polymoe.offline.checkpoint.cast import Rounding
from polymoe.offline.checkpoint.changes.changes import apply_changes
from polymoe.offline.checkpoint.formats.formats import source_tensors, take_quantization
from polymoe.offline.checkpoint.names import NameMap
from polymoe.offline.checkpoint.place import Place
from polymoe.offline.checkpoint.source import check_counts, check_files, read_stored, some
from polymoe.offline.checkpoint.source_tensor import TensorFiles
from polymoe.offline.checkpoint.unread import sort_unread

_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_config(path: Path) -> Any:
    """The transformers config of a checkpoint folder. Raises `CheckpointError` or `UnsupportedModelError`."""
    if not (path / "config.json").exists():
        hint = (
            " It holds a LoRA adapter; give it with its base, NAME=BASE+ADAPTER."
            if (path / "adapter_config.json").exists()
            else ""
        )
        raise CheckpointError(
            f"{path} has no config.json, so it is not a Hugging Face checkpoint; give the folder that has one.{hint}"
        )
    check_counts(path)
    try:
        return load_config(path)
    except CheckpointError:
        raise
    except Exception as error:  # unknown model_type, wrong field types: transformers raises many kinds
        raise UnsupportedModelError(
            f"{path / 'config.json'}: transformers cannot read it: {error} Correct it, or save the model again."
        ) from error


class Checkpoint:
    """A checked checkpoint: `tensor(name)` for each of `target_names`, all accounted for.

    `config`: its transformers config. `architecture`: where its experts are. `tied`: parameters that the model shares
    with another one (`lm_head.weight` -> `model.embed_tokens.weight`), which are not targets. `ignored`: stored names
    that the stock model does not read (rotary tables, multi-token prediction). `notes`: what a user should know about
    it, one line each.
    """

    def __init__(
        self,
        name: str,
        spec: str,
        place: Place,
        config: Any,
        architecture: ArchitectureInfo,
        files: TensorFiles,
        names: NameMap,
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.spec, self.place, self.path = name, spec, place, place.folder
        self.config, self.architecture = config, architecture
        self._files, self._names = files, names
        self._casts: Mapping[str, torch.dtype] = {}
        self.rounding = Rounding()
        self.notes = list(notes)
        if (self.path / "adapter_config.json").exists():
            self.notes.append("adapter_config.json: an adapter lies beside the weights and is not applied")
        self.ignored = self._account_for_stored()
        self.tied = self._account_for_targets()
        # target -> the target it is read from (itself, unless only the other end of a tie is stored)
        self._source = {
            target: target if target in names.targets else next(t for t, s in self.tied.items() if s == target)
            for target in names.model.state_dict()
            if target not in self.tied
        }
        self.target_names = tuple(self._source)
        self._check_tensors()

    @classmethod
    def open(cls, spec: str | Path, name: str) -> Self:
        """Open a folder or Hub model and check everything that can be checked without reading the weights.

        Raises `CheckpointError` (the message names variant, file and fix) or `UnsupportedModelError`.
        """
        with named(name, spec):
            place = Place.find(spec)
        path = place.folder
        with named(name, path):
            check_files(path)
            config = read_config(path)
            quantization = take_quantization(config)
            check_supported_config(config)
            stored = read_stored(path)
            model = build_on_meta(config)
            architecture = check_supported(config, model)
            files = TensorFiles(stored.tensors)
            names = NameMap(model, source_tensors(config, quantization, files))
            notes = (*stored.notes, *apply_changes(names, place.changes))
            opened = cls(name, str(spec), place, config, architecture, files, names, notes)
            return opened.untied() if opened.contradicts_ties else opened

    def untied(self) -> Self:
        """The same model with an output head of its own, which is the embedding again where no other is stored."""
        if not self.tied:
            return self
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        for config in {id(c): c for c in (other.config, other.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model = build_on_meta(other.config)
        other.architecture = check_supported(other.config, model)
        other.tied, other.rounding = dict(model.all_tied_weights_keys), Rounding()
        stored = self._names.targets
        other._source = {
            target: target if target in stored else self._source[self.tied.get(target, target)]
            for target in model.state_dict()
            if target not in other.tied
        }
        other.target_names = tuple(other._source)
        other._check_tensors()
        return other

    def cast(self, dtypes: Mapping[str, torch.dtype]) -> Self:
        """The same model with the named targets in other dtypes than they are stored in."""
        other = copy.copy(self)
        other._casts, other.rounding = dict(dtypes), Rounding()
        return other

    @property
    def model(self) -> Any:
        """The stock model, without its weights."""
        return self._names.model

    def shape(self, target: str) -> tuple[int, ...]:
        return self._names.targets[self._source[target]].shape

    def dtype(self, target: str) -> torch.dtype:
        """The dtype of `tensor(target)`: the one it is stored in, or cast to."""
        return self._casts.get(target, self._names.targets[self._source[target]].dtype)

    def num_bytes(self, target: str) -> int:
        return torch.Size(self.shape(target)).numel() * self.dtype(target).itemsize

    def tensor(self, target: str) -> Tensor:
        """One parameter or buffer, in `dtype(target)`, on the CPU. Reads only the stored tensors it is made of."""
        stored = self._read(self._source[target])
        if target not in self._casts:
            return stored
        with named(self.name, self.path):
            return self.rounding.cast(target, stored, self._casts[target])

    def _account_for_stored(self) -> tuple[str, ...]:
        """Names that are stored but not loaded on purpose. Raises `CheckpointError` for any other left-over name."""
        model, tensors = self._names.model, self._names.tensors
        unread = sort_unread(model, self._names.unmatched, list(tensors), self._names.left_out)
        strange = [*sorted(unread.strange), *sorted(set(self._names.targets) - set(model.state_dict()))]
        class_name = type(model).__name__
        if strange:
            trained_as = [name for name in self.config.architectures or () if name != class_name]
            hint = f" (config.json names {', '.join(trained_as)})" if trained_as else ""
            raise CheckpointError(
                f"{self.path}: {class_name} has no place for {some(strange, 6)}. Is this the checkpoint of another "
                f"architecture, or one with extra heads{hint}? Save the model without them."
            )
        self.notes += unread.notes(class_name, {name: self._files.num_bytes(tensors[name]) for name in unread.names})
        return unread.names

    def _account_for_targets(self) -> dict[str, str]:
        """{tied name: the name it shares a tensor with}. Raises `CheckpointError` for parameters that nothing fills."""
        model, have = self._names.model, self._names.targets
        tied: dict[str, str] = dict(model.all_tied_weights_keys)
        missing = []
        for target in model.state_dict():
            ends = {target, tied.get(target, target)} | {t for t, source in tied.items() if source == target}
            if not ends & set(have):
                missing.append(target)
        if missing:
            head = ' If the head is the embedding, set "tie_word_embeddings": true in config.json.'
            raise CheckpointError(
                f"{self.path}: not stored: {some(missing, 6)}. Is a shard missing? Download it again."
                + (head if "lm_head.weight" in missing else "")
            )
        self.contradicts_ties = False
        for target, source in tied.items():
            if target not in have or source not in have or self._same(target, source):
                continue
            if not kind_of(self.config).unties:
                raise CheckpointError(
                    f"{self.path}: config.json ties {target} to {source}, but they are stored with different values; "
                    'set "tie_word_embeddings": false in config.json if both are meant.'
                )
            self.contradicts_ties = True
            self.notes.append(
                f"config.json ties {target} to {source}, but they are stored with different values; both are used, as "
                'transformers does. "tie_word_embeddings": false would say so'
            )
        return tied

    def _same(self, target: str, source: str) -> bool:
        """Whether two tensors have the same values, in the less precise dtype of the two."""
        a, b = self._read(target), self._read(source)
        dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        return torch.equal(a.to(dtype), b.to(dtype))

    def _read(self, target: str) -> Tensor:
        return self._names.read(target, self._files.load)

    def _check_tensors(self) -> None:
        state = self._names.model.state_dict()
        for target in self.target_names:
            shape, dtype, want = self.shape(target), self.dtype(target), state[target]
            if shape != tuple(want.shape):
                rows = f' Set "vocab_size": {shape[0]} if the rows are meant.' if self._has_vocabulary(target) else ""
                raise CheckpointError(
                    f"{self.path}: {target} has shape {list(shape)}, config.json asks for {list(want.shape)}.{rows} "
                    "Do config.json and the weights belong together?"
                )
            sources = [
                self._names.tensors[name] for _, name in self._names.targets[self._source[target]].recipe.sources
            ]
            if want.is_floating_point() and (dtype not in _READABLE or None in {source.dtype for source in sources}):
                raise UnsupportedModelError(
                    f"{self.path}: {target} is stored as {'/'.join(sorted({s.stored_as for s in sources}))}, and "
                    "config.json does not say how that is to be read (quantization_config). Give the config.json that "
                    "belongs to the weights, or the original in float32, bfloat16 or float16."
                )

    def _has_vocabulary(self, target: str) -> bool:
        return target in self.architecture.vocab_tensors
