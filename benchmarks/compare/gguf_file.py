"""A checkpoint as a GGUF file, which llama.cpp reads: bfloat16 as it is, without a tokenizer.

For what the benchmarks run: Mixtral, GraniteMoE and Qwen3-MoE. Names and values of metadata are those of llama.cpp's
own converter. Of Mixtral and Granite the rows of query and key projections are interleaved, since llama.cpp rotates
neighbours there and transformers halves.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from workers import WorkerError

_ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_FLOAT32 = ("norm", "ffn_gate_inp")  # llama.cpp keeps them so


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write the checkpoint to `path`. Raises `WorkerError` for an architecture that is not one of the benchmarks'."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    config = model.config
    if config.model_type not in _ARCHITECTURES:
        raise WorkerError(f"{checkpoint}: no GGUF of {config.model_type} is written here")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]])
    _add_metadata(writer, config)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            for new_name, values in _renamed(name, tensor, config):
                _add(writer, new_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts: int = getattr(config, "num_local_experts", None) or config.num_experts
    width: int = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(width)
    writer.add_expert_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    scales: dict[str, Callable[[float], Any]] = {
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for name, add in scales.items():
        if (value := getattr(config, name, None)) is not None:
            add(value)


def _renamed(name: str, tensor: Tensor, config: PretrainedConfig) -> list[tuple[str, Tensor]]:
    """llama.cpp's names and values of a tensor of the stock model."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if not found:
        return [(f"{_NAMES[name.removesuffix('.weight')]}.weight", tensor)]
    layer, rest = f"blk.{found[1]}", found[2].removesuffix(".weight")
    if rest.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return [(f"{layer}.ffn_gate_exps.weight", gate), (f"{layer}.ffn_up_exps.weight", up)]
    if rest.endswith("experts.down_proj"):
        return [(f"{layer}.ffn_down_exps.weight", tensor)]
    if rest in ("self_attn.q_proj", "self_attn.k_proj") and config.model_type != "qwen3_moe":
        tensor = _interleaved(tensor, config.num_attention_heads if rest[10] == "q" else config.num_key_value_heads)
    return [(f"{layer}.{_LAYER_NAMES[rest]}.weight", tensor)]


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """`rows [heads * head_dim, hidden]`: of each head, row i of the first half beside row i of the second."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    if any(part in name for part in _FLOAT32):
        writer.add_tensor(name, tensor.float().numpy())
        return
    as_bytes = tensor.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
