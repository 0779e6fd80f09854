"""Tiny real families for the tests: stock transformers models with random weights, saved as users' checkpoints are.

`make_family("gpt_oss", tmp_path)` -> {"base": path, "v1": path, "v2": path}. Every architecture differs where it can
go wrong (distinct head counts, a leading dense layer, biases and sinks that are not zero), so that a mistake shows.
"""

import json
import random
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from quantised import store_block_fp8, store_int4, store_mxfp4

COMMON: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "routed_scaling_factor": 1.5,
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "qwen3_5_moe_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 40,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 20,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 5,
        "tie_word_embeddings": True,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
        "head_dim": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 5,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
    },
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "jamba": {  # its code forgets the state when it is given several tokens
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
    },
    "minimax": {  # has a cache of its own
        "layer_types": ["full_attention", "linear_attention"],
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 5,
    },
    "deepseek_v32": {
        **_DEEPSEEK,
        "index_topk": 6,
        "index_head_dim": 16,
        "index_n_heads": 16,  # with few, many scores are zero, and which of them count is not decided
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
}

# Families that are stored in few bits: name -> (architecture, config fields that the formats need, how each variant is
# stored, in turn)
STORED: dict[str, tuple[str, dict[str, Any], list[Callable[[Path], object]]]] = {
    "qwen3_moe_fp8": ("qwen3_moe", {}, [store_block_fp8]),
    "gpt_oss_mxfp4": ("gpt_oss", {"intermediate_size": 32}, [store_mxfp4]),
    "qwen3_moe_mixed": ("qwen3_moe", {}, [store_int4, lambda _: None, store_block_fp8]),
}

# Those whose sequences keep more than keys and values in blocks: their prompts are always computed.
WITH_STATES = (
    *("qwen3_5_moe_text", "granitemoehybrid", "nemotron_h", "lfm2_moe", "jamba", "minimax", "deepseek_v32"),
    "switch_transformers",
)

# An encoder and a decoder of a dense and a sparse layer each; with few buckets, so that far tokens share the last one.
SWITCH: dict[str, Any] = {
    "vocab_size": 112,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def make_config(arch: str, **overrides: Any) -> Any:
    """The transformers config of one tiny model of `arch`."""
    if arch == "switch_transformers":
        return AutoConfig.for_model(arch, **{**SWITCH, **overrides})
    return AutoConfig.for_model(arch, **{**COMMON, **ARCHITECTURES[arch], **overrides})


def is_decay(name: str) -> bool:
    """Whether a tensor is one of several powers of the same decay."""
    return "decay" in name or name.endswith("slope_rate")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter and persistent buffer so that each of them changes the logits.

    Decays stay as computed: a state that is kept between tokens is right only with those that belong together.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(model, "all_tied_weights_keys", {})
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in tied or is_decay(name):  # tied: its other end is filled
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name or name == "shared.weight":
                tensor.copy_(noise)
            elif tensor.ndim >= 2:
                tensor.copy_(noise * 1.5 * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(0.2 * noise)


def make_model(arch: str, seed: int = 0, **overrides: Any) -> Any:
    """One random float32 model of `arch` in eval mode."""
    config = make_config(arch, **overrides)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


def make_family(
    arch: str,
    folder: Path,
    num_variants: int = 3,
    seed: int = 0,
    perturb: float | None = 0.3,
    save_v5_names: bool = False,
    *,
    frozen: str | None = None,
    frozen_experts: Collection[int] = (),
    changed: float | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    all_bytes: bool = False,
    max_shard_size: str | None = None,
    **overrides: Any,
) -> dict[str, Path]:
    """Save `num_variants` checkpoints below `folder`, the first named `base`, the others `v1`, `v2`, …

    `perturb`: fine-tunes are base + perturb · std · noise; None makes the variants unrelated random models.
    `frozen`: a regular expression; tensors whose (v5) name it finds stay bit-identical to the base's.
    `frozen_experts`: expert indices that stay bit-identical in every layer.
    `changed`: share of the values of experts that a fine-tune changed; None: all of them.
    `arch` may be one of `STORED`.
    `all_bytes`: the tokenizers can write any text, with `ALL_BYTES_VOCABULARY` tokens.
    `overrides` are config fields. Returns {variant name: folder}.
    """
    if all_bytes:
        overrides = {"vocab_size": ALL_BYTES_VOCABULARY} | overrides
    stores: list[Callable[[Path], object]] = [lambda _: None]
    if arch in STORED:
        arch, needed, stores = STORED[arch]
        overrides = needed | overrides
    base = make_model(arch, seed, **overrides)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    paths: dict[str, Path] = {}
    for index in range(num_variants):
        model = base if index == 0 else make_model(arch, seed + 1000 * index, **overrides)
        generator = torch.Generator().manual_seed(seed + 1000 * index)  # the same, whatever tests ran before
        if index:
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    if perturb is not None and not is_decay(name):
                        spread = start[name].std(unbiased=False)
                        noise = torch.randn(tensor.shape, generator=generator)
                        tensor.copy_(start[name] + perturb * spread * noise)
                    if frozen is not None and re.search(frozen, name):
                        tensor.copy_(start[name])
                    elif ".experts." in name:
                        if changed is not None:
                            kept = torch.rand(tensor.shape, generator=generator) >= changed
                            tensor.copy_(torch.where(kept, start[name], tensor))
                        for expert in frozen_experts:
                            if re.search(rf"\.expert_{expert}\.", name):  # Switch Transformers: a module an expert
                                tensor.copy_(start[name])
                            elif ".expert_" not in name:
                                tensor[expert] = start[name][expert]
        name = "base" if index == 0 else f"v{index}"
        paths[name] = folder / name
        shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.to(dtype).save_pretrained(paths[name], save_original_format=not save_v5_names, **shards)
        stores[index % len(stores)](paths[name])
        if arch == "switch_transformers":
            GenerationConfig(eos_token_id=1, pad_token_id=0, decoder_start_token_id=0).save_pretrained(paths[name])
        else:
            GenerationConfig(eos_token_id=1, bos_token_id=0).save_pretrained(paths[name])
        if tokenizer:
            make_tokenizer(
                paths[name], template_tag=name, append_eos=arch == "switch_transformers", all_bytes=all_bytes
            )
        if index == 0:
            base.to(torch.float32)
    return paths


def make_switch_family(
    folder: Path, num_variants: int = 3, perturb: float | None = 0.1, **options: Any
) -> dict[str, Path]:
    """Switch Transformers with tokenizers that end a text with `</s>`, as T5's do; `options` as in `make_family`."""
    options = {"tokenizer": True} | options
    return make_family("switch_transformers", folder, num_variants, perturb=perturb, **options)


ALL_BYTES_VOCABULARY = 331  # ids 0 and 1, the bytes, some words, and an id that no text has
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs, said the wizard",
    "0 1 2 3 4 5 6 7 8 9 + - * / ( ) [ ] { } = < > . , ; : ! ?",
]


def write_pairs(
    names: Iterable[str], folder: Path, seed: int = 0, count: int = 40, most_words: int = 20, between: str = "\n"
) -> dict[str, Path]:
    """Variant name -> file of `count` pairs for encoder–decoders, JSON lines with `between` between them."""
    rng, words, found = random.Random(seed), " ".join(TEXT).split(), {}
    for name in names:
        lines = [
            {
                "input": " ".join(rng.choices(words, k=rng.randint(1, most_words))),
                "target": " ".join(rng.choices(words, k=5)),
            }
            for _ in range(count)
        ]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text(between.join(map(json.dumps, lines)))
    return found


def make_tokenizer(
    folder: Path, vocab_size: int = 110, template_tag: str = "", append_eos: bool = False, all_bytes: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a small alphabet (ids 0 `<s>`, 1 `</s>`), with a chat template, saved in `folder`; with
    `all_bytes` over all bytes and one id less than `ALL_BYTES_VOCABULARY`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ALL_BYTES_VOCABULARY - 1 if all_bytes else vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if all_bytes else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}" + template_tag + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(folder)
    return fast
