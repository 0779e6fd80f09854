"""Random decoder-only families of published shapes, written tensor by tensor: no model is ever whole in memory.

A shape is the keyword arguments of the architecture's own config, and `model_type`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.bench.switch_family import named_noise
from polymoe.offline.tensorfile import TensorFileWriter

# ibm-granite/granite-3.1-1b-a400m, 1.3B parameters, but for the context: its 131072 tokens would want 6.4 GB of keys
# and values for one sequence.
GRANITE_1B: dict[str, Any] = {
    "model_type": "granitemoe",
    "vocab_size": 49155,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 1500000,
    "rms_norm_eps": 1e-6,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Qwen3-30B-A3B made small, 491M parameters: its 128 experts of which 8 are used, narrower and in fewer layers.
QWEN3_128E: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 16384,
    "hidden_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Seconds for the whole benchmark: to try the commands, and for the tests. Their figures mean nothing.
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
TINY_GRANITE: dict[str, Any] = {**GRANITE_1B, **_TINY, "intermediate_size": 32}
TINY_QWEN3: dict[str, Any] = {**QWEN3_128E, **_TINY, "moe_intermediate_size": 32, "head_dim": 32, "num_experts": 16}

_DTYPE = torch.bfloat16
_SPREAD = 0.02  # of weights, as transformers initialises them
_NOISE = 0.02  # of a fine-tune, relative to the weights of the base


def write_decoder(folder: Path, index: int, shape: dict[str, Any]) -> None:
    """Variant `index` of the family of `shape` as a bfloat16 checkpoint in the new folder `folder`; 0 is the base."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    config.dtype = _DTYPE
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    writer = TensorFileWriter(folder / "model.safetensors", {name: (_DTYPE, size) for name, size in shapes.items()})
    for name in writer.names:
        writer.append(name, _weight(name, shapes[name], index))
    writer.close()
    config.save_pretrained(folder)


def _weight(name: str, shape: tuple[int, ...], index: int) -> Tensor:
    """The same for the same name and variant, whatever was drawn before."""
    base = torch.ones(shape) if len(shape) == 1 else named_noise(name, 0, shape).mul_(_SPREAD)
    if index:
        base += named_noise(name, index, shape).mul_(_NOISE * (1.0 if len(shape) == 1 else _SPREAD))
    return base.to(_DTYPE)
