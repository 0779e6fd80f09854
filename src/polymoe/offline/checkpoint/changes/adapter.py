"""PEFT LoRA adapters, merged into their base in float32 while it is read.

    weight + scaling · B A,   scaling = alpha / r, or alpha / √r (rsLoRA)
    DoRA: that with each row scaled to the length m:  m / ‖row‖ · row

as PEFT's `merge_and_unload` (`peft/tuners/lora/layer.py`, `dora.py`) does it. Stacked experts (`target_parameters`)
have A [r·E, in], expert after expert, and B [out, r·E], with the expert as the fastest index. What `modules_to_save`
holds replaces the base's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.bundle.plain_files import read_json, why_not_to_read
from polymoe.bundle.tensor_file import read_header
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.changes.edit import Edit
from polymoe.offline.checkpoint.source_tensor import TensorFiles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "Merge it with PEFT (merge_and_unload) and give the result."
# Fields that change what an adapter computes, in a way that is not read here.
_OTHER_WAYS = (
    *("layer_replication", "fan_in_fan_out", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
    *("trainable_token_indices", "megatron_config", "velora_config", "monteclora_config"),
)
# They change the base before training; the adapter alone is no fine-tune of what is stored.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_embedding_[AB]|lora_[AB]|lora_magnitude_vector)(\.weight|(?P<bias>\.bias))?"
)
_SAVED = re.compile(r"\.(modules_to_save|base_layer)(?=\.)")


@dataclass(frozen=True)
class _Settings:
    path: Path
    raw: Mapping[str, Any]

    def scaling(self, module: str, rank: int) -> float:
        """Raises `CheckpointError` for another rank than the config says."""
        r = self._of(module, "rank_pattern", self.raw.get("r", 8))
        if r != rank:
            raise CheckpointError(
                f"{self.path}: {module} has rank {rank}, {CONFIG} says {r}. Do the two belong together?"
            )
        alpha = float(self._of(module, "alpha_pattern", self.raw.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, default: Any) -> Any:
        """As PEFT matches them: the first pattern that the module's path ends with."""
        found = self.raw.get(patterns) or {}
        return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter(folder: Path, model: Any) -> dict[str, Edit]:
    """Name of a parameter -> what to change there. `model`: the stock model of the base, on the meta device.

    Raises `CheckpointError` for an adapter that is damaged or of a kind that is not merged here.
    """
    settings = _Settings(folder, _config(folder))
    weights = folder / WEIGHTS
    if not weights.exists():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; save the adapter as safetensors.")
    files = TensorFiles({name: (weights, entry) for name, entry in read_header(weights).items()})
    factors: dict[str, dict[str, str]] = {}
    edits: dict[str, Edit] = {}
    for key in files.entries:
        name = key.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[match["part"] + (match["bias"] or "")] = key
        elif "lora_" in name or "token_adapter" in name:
            raise CheckpointError(f"{weights}: {key} is not a part of a LoRA adapter that is read here. {_MERGE}")
        elif ".original_module." not in name:
            edits[_SAVED.sub("", name)] = _replacement(weights, key, files)
    for module, parts in factors.items():
        edits |= _low_rank(settings, module, parts, files, model)
    return edits


def _config(folder: Path) -> Mapping[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists() and (reason := why_not_to_read(folder / name, folder)):
            raise CheckpointError(f"{folder / name} {reason}.")
    raw = read_json(folder / CONFIG)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder}: an adapter of the kind {kind}; only LORA is merged here. {_MERGE}")
    if odd := [name for name in _OTHER_WAYS if raw.get(name)]:
        raise CheckpointError(f"{folder / CONFIG}: {', '.join(odd)}: adapters with it are not merged here. {_MERGE}")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights is {start}, which changes the base before training. Save the "
            "adapter converted to plain LoRA (path_initial_model_for_weight_conversion), or merge it with PEFT."
        )
    return raw


def _replacement(path: Path, key: str, files: TensorFiles) -> Edit:
    return Edit(str(path), files.entries[key].shape, lambda tensor: files.load(key).to(tensor.dtype))


def _low_rank(
    settings: _Settings, module: str, parts: Mapping[str, str], files: TensorFiles, model: Any
) -> dict[str, Edit]:
    path = str(settings.path / WEIGHTS)
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise CheckpointError(f"{path}: {module} has no {missing[0]}; save the adapter again.")
    a, b = (files.entries[parts[name]].shape for name in names)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise CheckpointError(f"{path}: {module}: A of shape {list(a)} and B of shape {list(b)} do not fit each other.")

    def factors() -> tuple[Tensor, Tensor]:
        return files.load(parts[names[0]]).float(), files.load(parts[names[1]]).float()

    if parameter := _stacked_parameter(settings, module, model):
        return {parameter: _stacked(path, parameter, settings, (a, b), factors, model)}
    scaling = settings.scaling(module, a[0])
    magnitude = parts.get("lora_magnitude_vector")

    def apply(tensor: Tensor) -> Tensor:
        left, right = factors()
        delta = right @ left
        merged = tensor.float() + scaling * (delta.T if embedding else delta)
        if magnitude is not None:
            axis = 0 if embedding else 1  # that a length is taken over
            length = files.load(magnitude).float().flatten()
            merged *= (length / merged.norm(dim=axis)).unsqueeze(axis)
        return merged.to(tensor.dtype)

    shape = (a[1], b[0]) if embedding else (b[0], a[1])
    found = {f"{module}.weight": Edit(path, shape, apply)}
    if bias := parts.get("lora_B.bias"):

        def add(tensor: Tensor) -> Tensor:
            return (tensor.float() + scaling * files.load(bias).float()).to(tensor.dtype)

        found[f"{module}.bias"] = Edit(path, files.entries[bias].shape, add)
    return found


def _stacked_parameter(settings: _Settings, module: str, model: Any) -> str | None:
    """Which parameter an adapter of `target_parameters` is for; None for one of a linear map.

    PEFT wraps a module once for each parameter, in the module's order: the last one has no `base_layer` in its name.
    """
    targets = settings.raw.get("target_parameters") or []
    plain = module.replace(".base_layer", "")
    inner = _submodule(model, plain)
    if inner is None or not targets:
        return None
    own = [name for name, _ in inner.named_parameters(recurse=False)]
    wrapped = [name for name in own if any(f"{plain}.{name}".endswith(f".{target}") for target in targets)]
    depth = module.count(".base_layer")
    return f"{plain}.{wrapped[-1 - depth]}" if depth < len(wrapped) else None


def _submodule(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _stacked(
    path: str, name: str, settings: _Settings, shapes: tuple[tuple[int, ...], tuple[int, ...]], factors: Any, model: Any
) -> Edit:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    shape = tuple(module.get_parameter(leaf).shape)
    experts = shape[0] if len(shape) == 3 else 1
    rank = shapes[0][0] // experts
    scaling = settings.scaling(name, rank)
    transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    sides = (shapes[0][1], shapes[1][0]) if transposed else (shapes[1][0], shapes[0][1])

    def apply(tensor: Tensor) -> Tensor:
        left, right = factors()
        left, right = left.reshape(experts, rank, -1), right.reshape(len(right), rank, experts)
        rows = tensor.reshape(experts, *sides)
        changed = torch.empty_like(rows)
        for expert in range(experts):
            delta = right[..., expert] @ left[expert]
            changed[expert] = rows[expert].float() + scaling * (delta.T if transposed else delta)
        return changed.reshape(tensor.shape)

    return Edit(path, (experts, *sides) if len(shape) == 3 else sides, apply)
