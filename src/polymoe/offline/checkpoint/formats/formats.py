"""Which formats of stored weights are read; what config.json says of them, applied to a checkpoint's tensors."""

from collections.abc import Mapping
from typing import Any

import torch

from polymoe.errors import CheckpointError, UnsupportedModelError
from polymoe.offline.checkpoint.formats.block_fp8 import read_block_fp8
from polymoe.offline.checkpoint.formats.compressed import read_compressed
from polymoe.offline.checkpoint.formats.decoded import Format
from polymoe.offline.checkpoint.formats.mxfp4 import read_mxfp4
from polymoe.offline.checkpoint.formats.packed_int import read_awq, read_gptq
from polymoe.offline.checkpoint.source_tensor import SourceTensor, TensorFiles, plain

# `quant_method` of config.json -> what reads it
FORMATS: Mapping[str, Format] = {
    "fp8": read_block_fp8,
    "mxfp4": read_mxfp4,
    "compressed-tensors": read_compressed,
    "awq": read_awq,
    "gptq": read_gptq,
}


def take_quantization(config: Any) -> Mapping[str, Any] | None:
    """How config.json says that the weights are stored; from then on `config` is that of the dequantised model.

    Raises `UnsupportedModelError` for a method that is not read.
    """
    settings = None
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            settings = dict(found if isinstance(found, Mapping) else found.to_dict())
            del part.quantization_config
    if settings is None:
        return None
    method = str(settings.get("quant_method", "no quant_method"))
    if method not in FORMATS:
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({method}), which is not read; {', '.join(FORMATS)} are. Give the original "
            "in 16 or 32 bits, or load this one with transformers, call dequantize() and save_pretrained()."
        )
    return settings


def source_tensors(config: Any, settings: Mapping[str, Any] | None, files: TensorFiles) -> dict[str, SourceTensor]:
    """Name -> tensor, in 16 or 32 bits whatever `settings` say of how it is stored.

    Quantised weights become the config's dtype, as transformers makes them with `dtype="auto"`; bfloat16 where it names
    none. Raises `CheckpointError`.
    """
    if settings is None:
        return {name: plain(name, entry) for name, entry in files.entries.items()}
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    decoded = FORMATS[settings["quant_method"]](
        settings, files, dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    )
    if not decoded.tensors:
        raise CheckpointError(
            f"config.json says that the weights are quantised ({settings['quant_method']}), but none is stored so; "
            "remove its quantization_config if they are not."
        )
    used = set(decoded.used)
    rest = {name: plain(name, entry) for name, entry in files.entries.items() if name not in used}
    return rest | decoded.tensors
