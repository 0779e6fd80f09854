"""MXFP4 (gpt-oss): `X_blocks` uint8 [E, out, G, 16], two 4-bit floats a byte, beside `X_scales` uint8 [E, out, G].

32 values share an exponent; transformers' `convert_moe_packed_tensors` makes [E, 32·G, out] of them, exactly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.formats.decoded import Decoded
from polymoe.offline.checkpoint.source_tensor import Load, Make, SourceTensor, TensorFiles

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block


def read_mxfp4(_settings: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype) -> Decoded:
    found, entries = Decoded(), files.entries
    for scales in entries:
        if scales.endswith(_SCALES) and scales.removesuffix(_SCALES) + _BLOCKS not in entries:
            raise CheckpointError(f"{scales} is stored without its {_BLOCKS}; is a shard missing? Download it again.")
    for blocks, entry in entries.items():
        if not blocks.endswith(_BLOCKS):
            continue
        name = blocks.removesuffix(_BLOCKS)
        scales = name + _SCALES
        if scales not in entries:
            raise CheckpointError(f"{blocks} is stored without {scales}; is a shard missing? Download it again.")
        fits = len(entry.shape) == 4 and entry.shape[-1] == _BYTES and entries[scales].shape == entry.shape[:-1]
        if not fits or {entry.dtype, entries[scales].dtype} != {torch.uint8}:
            raise CheckpointError(
                f"{blocks} of shape {list(entry.shape)} and {scales} of shape {list(entries[scales].shape)} are not "
                f"blocks of 32 values with a scale each; download both again."
            )
        experts, out, groups, _ = entry.shape
        shape = (experts, groups * 2 * _BYTES, out)
        found.tensors[name] = SourceTensor(
            shape, dtype, "MXFP4", (blocks, scales), _maker(blocks, scales, shape, dtype)
        )
    return found


def _maker(blocks: str, scales: str, shape: tuple[int, ...], dtype: torch.dtype) -> Make:
    def make(load: Load) -> Tensor:
        packed, exponents = load(blocks), load(scales)
        result = torch.empty(shape, dtype=dtype)
        for expert in range(shape[0]):  # one at a time: the codes are made 32-bit integers meanwhile
            one = slice(expert, expert + 1)
            result[one] = convert_moe_packed_tensors(packed[one], exponents[one], dtype=dtype)
        return result

    return make
