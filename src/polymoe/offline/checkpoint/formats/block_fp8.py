"""FP8 with scales of blocks (DeepSeek-V3, Qwen3-…-FP8): `X.weight` beside `X.weight_scale_inv`.

weight = fp8 · scale of its block, in float32, rounded once, as transformers' `Fp8Dequantize` does it. One scale may
also be for the whole tensor or, an exponent of 2, for 32 values (MXFP8); and the weight may be two FP4 values a byte.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from polymoe.bundle.tensor_file import TensorEntry
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.formats.decoded import Decoded
from polymoe.offline.checkpoint.source_tensor import Load, SourceTensor, TensorFiles

# Stacked experts have the suffix without a dot: `experts.gate_up_proj_scale_inv`.
_SCALE = re.compile(r"(?P<weight>.+)_scale_inv|(?P<module>.+)\.(qscale_weight|scale)")
_OF_ACTIVATIONS = re.compile(r".+[._](activation_scale|input_scale|qscale_act)")
_FP8 = ("F8_E4M3", "F8_E5M2")
_FP4 = "I8"  # two values a byte


def read_block_fp8(settings: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype) -> Decoded:
    found, entries = Decoded(), files.entries
    blocks = settings.get("weight_block_size")
    for scale, entry in entries.items():
        if _OF_ACTIVATIONS.fullmatch(scale):
            found.dropped.append(scale)
        match = _SCALE.fullmatch(scale)
        if match is None:
            continue
        weight = match["weight"] or f"{match['module']}.weight"
        stored = entries.get(weight)
        if stored is None and match["module"]:
            continue  # a parameter of that name
        if stored is None:
            raise CheckpointError(f"{scale} is stored without {weight}; is a shard missing? Download it again.")
        if stored.dtype_name in (*_FP8, _FP4):
            found.tensors[weight] = _weight(weight, stored, scale, entry, blocks, dtype)
    return found


def _weight(
    name: str, stored: TensorEntry, scale: str, scales: TensorEntry, blocks: Any, dtype: torch.dtype
) -> SourceTensor:
    packed = stored.dtype_name == _FP4
    shape = (*stored.shape[:-1], 2 * stored.shape[-1]) if packed else stored.shape
    block = _block(shape, scales.shape, None if packed else blocks)
    if block is None:
        raise CheckpointError(
            f"{name} of shape {list(stored.shape)} does not fit the blocks of {scale} of shape {list(scales.shape)} "
            f"(weight_block_size: {blocks}). Do config.json and the weights belong together?"
        )

    def make(load: Load) -> Tensor:
        weight, factor = load(name), load(scale)
        if weight.ndim == 2:
            return _dequantise(weight, factor, block, dtype)
        # Expert by expert: the arithmetic is in float32, which the whole stack would need several times.
        result = torch.empty(shape, dtype=dtype)
        each = factor if factor.ndim == 3 else factor.reshape(-1, 1, 1).expand(shape[0], 1, 1)
        for index, row in enumerate(weight):
            result[index] = _dequantise(row, each[index], block, dtype)
        return result

    return SourceTensor(shape, dtype, stored.dtype_name, (name, scale), make)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], configured: Any) -> tuple[int, int] | None:
    """Rows and columns of one scale's block; None where the shapes do not fit each other."""
    if len(shape) not in (2, 3):
        return None
    rows, columns = shape[-2:]
    if len(scales) != len(shape):  # one scale, or one an expert
        return (rows, columns) if torch.Size(scales).numel() in (1, *shape[:-2]) else None
    if scales[:-2] != shape[:-2]:
        return None
    down, across = scales[-2:]
    if configured and (down, across) == (-(-rows // configured[0]), -(-columns // configured[1])):
        return int(configured[0]), int(configured[1])
    return None if rows % down or columns % across else (rows // down, columns // across)


def _dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[rows, columns] with its grid of scales. The last blocks may be cut; transformers wants whole ones."""
    rows, columns = weight.shape
    scale = scale if scale.ndim == 2 else scale.reshape(1, 1)
    cut = weight.dtype != torch.int8 and bool(rows % block[0] or columns % block[1])
    if cut:
        missing = (0, -columns % block[1], 0, -rows % block[0])
        weight = pad(weight.view(torch.uint8), missing).view(weight.dtype)
    result: Tensor = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    return result[:rows, :columns].contiguous() if cut else result
