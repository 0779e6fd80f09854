"""One fine-tuned model on disk, read lazily tensor by tensor under the stock model's parameter names."""

import re
import threading
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from polymoe.errors import CheckpointError, UnsupportedModelError
from polymoe.offline.architecture import ArchitectureInfo, build_on_meta, check_supported, check_supported_config
from polymoe.offline.config_checks import load_config
from polymoe.offline.names import NameMap
from polymoe.offline.source import check_counts, check_files, read_stored, resolve
from polymoe.offline.tensorfile import TensorEntry

_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_config(path: Path) -> Any:
    """The transformers config of a checkpoint folder. Raises `CheckpointError` or `UnsupportedModelError`."""
    if not (path / "config.json").exists():
        hint = " It holds a LoRA adapter; merge it first." if (path / "adapter_config.json").exists() else ""
        raise CheckpointError(f"{path} has no config.json, so it is not a Hugging Face checkpoint.{hint}")
    check_counts(path)
    try:
        return load_config(path)
    except CheckpointError:
        raise
    except Exception as error:  # unknown model_type, wrong field types: transformers raises many kinds
        raise UnsupportedModelError(f"{path / 'config.json'}: transformers cannot read it: {error}") from error


class Checkpoint:
    """A checked checkpoint: `tensor(name)` for each of `target_names`, all accounted for.

    `config`: its transformers config. `architecture`: where its experts are. `tied`: parameters that the model shares
    with another one (`lm_head.weight` -> `model.embed_tokens.weight`), which are not targets. `ignored`: stored names
    that the stock model class is documented not to load (for example multi-token-prediction layers).
    """

    def __init__(
        self,
        name: str,
        spec: str,
        path: Path,
        config: Any,
        architecture: ArchitectureInfo,
        stored: dict[str, tuple[Path, TensorEntry]],
        names: NameMap,
    ) -> None:
        self.name, self.spec, self.path = name, spec, path
        self.config, self.architecture = config, architecture
        self._stored, self._names = stored, names
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()
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

        Raises `CheckpointError` (the message names file and fix) or `UnsupportedModelError`.
        """
        path = resolve(spec)
        check_files(path)
        config = read_config(path)
        check_supported_config(config)
        stored = read_stored(path)
        model = build_on_meta(config)
        architecture = check_supported(config, model)
        names = NameMap(model, {key: entry for key, (_, entry) in stored.items()})
        return cls(name, str(spec), path, config, architecture, stored, names)

    def shape(self, target: str) -> tuple[int, ...]:
        return self._names.targets[self._source[target]].shape

    def dtype(self, target: str) -> torch.dtype:
        """The dtype the tensor is stored in."""
        return self._names.targets[self._source[target]].dtype

    def num_bytes(self, target: str) -> int:
        return torch.Size(self.shape(target)).numel() * self.dtype(target).itemsize

    def tensor(self, target: str) -> Tensor:
        """One parameter or buffer, as stored, on the CPU. Reads only the stored tensors it is made of."""
        return self._names.read(self._source[target], self._load)

    def _load(self, stored_name: str) -> Tensor:
        path = self._stored[stored_name][0]
        with self._lock:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            handle = self._handles[path]
        tensor: Tensor = handle.get_tensor(stored_name)
        return tensor

    def _account_for_stored(self) -> tuple[str, ...]:
        """Names that are stored but not loaded on purpose. Raises `CheckpointError` for any other left-over name."""
        model = self._names.model
        state = model.state_dict()
        patterns = list(model._keys_to_ignore_on_load_unexpected or [])
        # Old checkpoints store rotary tables, which are computed now; transformers skips these two as well.
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
        ignored = tuple(n for n in self._names.unmatched if any(re.search(pattern, n) for pattern in patterns))
        strange = sorted(set(self._names.unmatched) - set(ignored)) + sorted(set(self._names.targets) - set(state))
        if strange:
            raise CheckpointError(
                f"{self.path}: {type(model).__name__} has no place for {_some(strange)}. "
                "Is this the checkpoint of another architecture, or one with extra heads?"
            )
        return ignored

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
            raise CheckpointError(f"{self.path}: not stored: {_some(missing)}. Is a shard missing? Download it again.")
        for target, source in tied.items():
            if target in have and source in have and not torch.equal(self._read(target), self._read(source)):
                raise CheckpointError(
                    f"{self.path}: config.json ties {target} to {source}, but they are stored with different values; "
                    'set "tie_word_embeddings": false in config.json if both are meant.'
                )
        return tied

    def _read(self, target: str) -> Tensor:
        return self._names.read(target, self._load)

    def _check_tensors(self) -> None:
        state = self._names.model.state_dict()
        for target in self.target_names:
            shape, dtype, want = self.shape(target), self.dtype(target), state[target]
            if shape != tuple(want.shape):
                raise CheckpointError(
                    f"{self.path}: {target} has shape {list(shape)}, config.json asks for {list(want.shape)}."
                )
            kinds = {self._stored[name][1].dtype_name for _, name in self._recipe_sources(target)}
            if want.is_floating_point() and (dtype not in _READABLE or None in self._stored_dtypes(target)):
                raise UnsupportedModelError(
                    f"{self.path}: {target} is stored as {'/'.join(sorted(kinds))}; quantised checkpoints are not "
                    "read. Give the original in float32, bfloat16 or float16."
                )

    def _recipe_sources(self, target: str) -> list[tuple[str, str]]:
        return self._names.targets[self._source[target]].recipe.sources

    def _stored_dtypes(self, target: str) -> set[torch.dtype | None]:
        return {self._stored[name][1].dtype for _, name in self._recipe_sources(target)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
