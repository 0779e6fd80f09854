"""compressed-tensors (llm-compressor): FP8, integers packed into `X.weight_packed`, NVFP4 and its other kinds.

The package of that name says which scheme a module has and decompresses it; it is needed for these checkpoints only.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymoe.errors import CheckpointError, UnsupportedModelError
from polymoe.offline.checkpoint.formats.decoded import Decoded
from polymoe.offline.checkpoint.source_tensor import Load, SourceTensor, TensorFiles

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

_PARTS = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
_OF_ACTIVATIONS = re.compile(
    r".+\.((input|output)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point|global_scale))"
)
_CLASSES = ("Linear", "Embedding")  # targets that name a class; a name of its own or a pattern goes before them


def read_compressed(settings: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype) -> Decoded:
    config = _config(settings)
    found, entries = Decoded(), files.entries
    for name in entries:
        module, _, leaf = name.rpartition(".")
        if _OF_ACTIVATIONS.fullmatch(name):
            found.dropped.append(name)
        elif leaf == "weight_g_idx":
            raise UnsupportedModelError(
                f"{name}: weights whose inputs were reordered (actorder: group) are not read. Give the original in 16 "
                "or 32 bits, or a checkpoint quantised without it."
            )
        elif leaf in _PARTS and f"{module}.weight_packed" not in entries and f"{module}.weight" not in entries:
            raise CheckpointError(f"{name} is stored without its weight; is a shard missing? Download it again.")
        elif leaf == "weight_packed" or (leaf == "weight" and f"{module}.weight_scale" in entries):
            found.tensors[f"{module}.weight"] = _weight(module, leaf, _scheme(config, module), files, dtype)
    return found


def _config(settings: Mapping[str, Any]) -> "QuantizationConfig":
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise UnsupportedModelError(
            "the checkpoint is quantised (compressed-tensors); install the package that reads it: "
            "pip install 'polymoe[compressed]'."
        ) from error
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    status = settings.get("quantization_status", "compressed")
    if sparsity != "dense" or status != "compressed" or settings.get("transform_config"):
        kind = "rotated" if settings.get("transform_config") else f"{sparsity}, status {status}"
        raise UnsupportedModelError(
            f"its compressed-tensors weights are of a kind that is not read ({kind}). Give the original in 16 or 32 "
            "bits."
        )
    known = {key: value for key, value in settings.items() if key in QuantizationConfig.model_fields}
    try:
        return QuantizationConfig.model_validate(known)
    except ValueError as error:
        raise CheckpointError(
            f"config.json: its quantization_config is not one of compressed-tensors: {error}"
        ) from error


def _scheme(config: "QuantizationConfig", module: str) -> "QuantizationScheme":
    from compressed_tensors.utils.match import match_name

    groups: list[Any] = list(config.config_groups.values())
    named = [g for g in groups if any(match_name(module, target) for target in g.targets)]
    for group in (*named, *(g for g in groups if set(_CLASSES) & set(g.targets))):
        if group.weights is not None:
            return group.model_copy(update={"format": group.format or _format(config, group)})
    raise CheckpointError(
        f"{module} is stored as compressed, but no group of config.json's quantization_config has it as a target."
    )


def _format(config: "QuantizationConfig", scheme: "QuantizationScheme") -> str:
    if config.format != "mixed-precision":
        return str(config.format)
    from compressed_tensors.compressors.format import infer_module_format

    return str(infer_module_format(torch.nn.Linear, scheme).value)


def _weight(
    module: str, leaf: str, scheme: "QuantizationScheme", files: TensorFiles, dtype: torch.dtype
) -> SourceTensor:
    from compressed_tensors.compressors import BaseCompressor

    entries = files.entries
    parts = tuple(f"{module}.{part}" for part in (leaf, *_PARTS) if f"{module}.{part}" in entries)
    try:
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
    except KeyError as error:
        raise UnsupportedModelError(
            f"{parts[0]}: compressed-tensors cannot decompress the format {scheme.format}. Give the original in 16 or "
            "32 bits."
        ) from error
    for needed in compressor.compression_param_names(scheme):
        if needed.startswith("weight") and f"{module}.{needed}" not in entries:
            raise CheckpointError(
                f"{parts[0]} is stored without {module}.{needed}; is a shard missing? Download it again."
            )

    def make(load: Load) -> Tensor:
        state = {part.rpartition(".")[2]: load(part) for part in parts}
        try:
            weight: Tensor = compressor.decompress(state, scheme)["weight"]
        except Exception as error:  # whatever torch raises for parts that do not fit each other
            raise CheckpointError(f"{', '.join(parts)} cannot be decompressed: {error}") from error
        return weight.detach().to(dtype)

    return SourceTensor(_shape(parts, scheme, files), dtype, str(scheme.format), parts, make)


def _shape(parts: tuple[str, ...], scheme: "QuantizationScheme", files: TensorFiles) -> tuple[int, ...]:
    """Of the decompressed weight."""
    module, _, leaf = parts[0].rpartition(".")
    stored = files.entries[parts[0]].shape
    if leaf == "weight":
        return stored
    if f"{module}.weight_shape" in parts:
        return tuple(int(size) for size in files.load(f"{module}.weight_shape"))
    group = scheme.weights.group_size if scheme.weights is not None else None
    if not group:
        raise CheckpointError(f"{parts[0]} is stored without {module}.weight_shape; download it again.")
    return (*stored[:-1], files.entries[f"{module}.weight_scale"].shape[-1] * group)
