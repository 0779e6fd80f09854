"""Random families of published shapes, written tensor by tensor: no model is ever whole in memory.

A shape is the keyword arguments of the architecture's own config, and `model_type`; without one, Switch Transformers'.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.bundle.tensor_file import TensorFileWriter
from polymoe.model.stock.kind import kind_of

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
# Qwen3.5-35B-A3B made small, 427M parameters: three of four layers are linear attention.
QWEN3_5_HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 16384,
    "hidden_size": 768,
    "moe_intermediate_size": 320,
    "shared_expert_intermediate_size": 320,
    "num_hidden_layers": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
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
TINY_HYBRID: dict[str, Any] = {
    **QWEN3_5_HYBRID,
    **_TINY,
    "layer_types": ["linear_attention", "full_attention"],
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 16,
}
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
_SWITCH = "switch_transformers"
_DTYPE = torch.bfloat16
_SPREAD = 0.02  # of weights, as transformers initialises them
_NOISE = 0.02  # of a fine-tune, relative to the weights of the base


def write_variant(folder: Path, index: int, shape: dict[str, Any]) -> None:
    """Variant `index` of the family of `shape` as a bfloat16 checkpoint in the new folder `folder`; 0 is the base."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.for_model(**{"model_type": _SWITCH} | shape)
    config.dtype = _DTYPE
    with torch.device("meta"):
        model: Any = kind_of(config).auto.from_config(config)
    config.architectures = [type(model).__name__]
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    writer = TensorFileWriter(folder / "model.safetensors", {name: (_DTYPE, size) for name, size in shapes.items()})
    weight = _switch_weight if config.model_type == _SWITCH else _weight
    for name in writer.names:
        writer.append(name, weight(name, shapes[name], index))
    writer.close()
    config.save_pretrained(folder)
    if config.model_type == _SWITCH:
        ids = {name: shape[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)


def _weight(name: str, shape: tuple[int, ...], index: int) -> Tensor:
    """The same for the same name and variant, whatever was drawn before."""
    base = torch.ones(shape) if len(shape) == 1 else named_noise(name, 0, shape).mul_(_SPREAD)
    if index:
        base += named_noise(name, index, shape).mul_(_NOISE * (1.0 if len(shape) == 1 else _SPREAD))
    return base.to(_DTYPE)


def _switch_weight(name: str, shape: tuple[int, ...], index: int) -> Tensor:
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
