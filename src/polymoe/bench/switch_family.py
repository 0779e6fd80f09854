"""Random Switch Transformers of a real shape, written tensor by tensor: no model is ever whole in memory."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.offline.tensorfile import TensorFileWriter

# Google's Switch-Base-8 with half of its layers sparse: 620M parameters.
SWITCH_BASE_8: dict[str, Any] = {
    "vocab_size": 32128,
    "n_positions": 512,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "num_experts": 8,
    "expert_capacity": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# Seconds for the whole benchmark: to try the commands, and for the tests. Its figures mean nothing.
TINY_SWITCH: dict[str, Any] = {
    **SWITCH_BASE_8,
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
_DTYPE = torch.bfloat16
_NOISE = 0.02  # of a fine-tune, relative to the weights of the base


def write_switch(folder: Path, index: int, shape: dict[str, Any]) -> None:
    """Variant `index` of the family of `shape` as a bfloat16 checkpoint in the new folder `folder`; 0 is the base."""
    from transformers import GenerationConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(**shape, architectures=["SwitchTransformersForConditionalGeneration"])
    config.dtype = _DTYPE
    with torch.device("meta"):
        model: Any = SwitchTransformersForConditionalGeneration(config)
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    writer = TensorFileWriter(folder / "model.safetensors", {name: (_DTYPE, size) for name, size in shapes.items()})
    for name in writer.names:
        writer.append(name, _weight(name, shapes[name], index))
    writer.close()
    config.save_pretrained(folder)
    ids = {name: shape[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)


def _weight(name: str, shape: tuple[int, ...], index: int) -> Tensor:
    """The same for the same name and variant, whatever was drawn before."""
    if len(shape) == 1:  # a norm
        base, spread = torch.ones(shape), 1.0
    else:
        # As in training: embeddings are of size 1, projections keep the size of what goes through them.
        spread = 1.0 if name == "shared.weight" else 1 / math.sqrt(shape[1])
        if name.endswith("Attention.q.weight"):
            spread /= 8  # instead of a scaling by 1 / √64 in attention
        base = named_noise(name, 0, shape) * spread
    return (base + (named_noise(name, index, shape) * _NOISE * spread if index else 0)).to(_DTYPE)


def named_noise(name: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values that only the arguments decide."""
    digest = hashlib.sha256(f"{index} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator)
