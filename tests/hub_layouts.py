"""Tiny checkpoints laid out as the published ones of their architecture are: names, stacks, towers, further heads.

What transformers saves under the names of transformers 4 is that already for most; `as_on_the_hub` does the rest.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantised import store_block_fp8

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight")


def as_on_the_hub(arch: str, folder: Path) -> None:
    """Rewrite the checkpoint of a model of `arch` in `folder`, where published ones look otherwise."""
    if arch in _LAYOUTS:
        _LAYOUTS[arch](folder)


def _rewrite(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def stacked_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor an expert and matrix -> `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]."""
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            parts.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
        else:
            rest[name] = tensor
    for (path, kind), rows in parts.items():
        stack = torch.stack([rows[i] for i in range(len(rows))])
        if kind == "down":
            rest[f"{path}.down_proj"] = stack
        elif kind == "gate":
            up = parts[path, "up"]
            rest[f"{path}.gate_up_proj"] = torch.cat([stack, torch.stack([up[i] for i in range(len(up))])], dim=1)
    return rest


def _qwen3_5_moe(folder: Path) -> None:
    """Qwen3.5-35B-A3B: the text model inside a multimodal one, beside its tower and a layer that predicts ahead."""
    text = stacked_experts(load_file(folder / "model.safetensors"))
    prediction = {n.replace("model.layers.2.", "mtp.layers.0."): t.clone() for n, t in text.items() if "layers.2." in n}
    stored = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in text.items()}
    stored |= prediction | {f"mtp.{name}.weight": torch.ones(32) for name in _AHEAD}
    stored["mtp.fc.weight"] = torch.ones(32, 64)
    stored |= {f"model.visual.{name}": torch.ones(4, 4) for name in _TOWER}
    config = _config(folder)
    vision = {
        **{"model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2},
        **{"out_hidden_size": 32, "num_position_embeddings": 16},
    }
    whole = {
        **{"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"},
        **{"text_config": config, "vision_config": vision, "tie_word_embeddings": False, "dtype": config["dtype"]},
        **{"image_token_id": 109, "video_token_id": 108, "vision_start_token_id": 107, "vision_end_token_id": 106},
    }
    _rewrite(folder, stored, whole)


_AHEAD = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
_TOWER = (
    *("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight", "blocks.0.norm1.weight"),
    *("blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.weight"),
    *("blocks.0.mlp.linear_fc1.weight", "blocks.0.mlp.linear_fc2.weight", "merger.norm.weight"),
    *("merger.linear_fc1.weight", "merger.linear_fc2.weight"),
)


def _deepseek_v32(folder: Path) -> None:
    """DeepSeek-V3.2: FP8 in blocks, and a layer after the last that predicts ahead."""
    stored = load_file(folder / "model.safetensors")
    last = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in stored.items() if "model.layers.2." in n}
    own = {"eh_proj": torch.ones(32, 64), "shared_head.head": stored["lm_head.weight"].clone()}
    own |= {"embed_tokens": stored["model.embed_tokens.weight"].clone()}
    own |= {name: torch.ones(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    last |= {f"model.layers.3.{name}.weight": tensor for name, tensor in own.items()}
    _rewrite(folder, stored | last, _config(folder))
    store_block_fp8(folder, (4, 4), linear=re.compile(r".*((?<!weights)_proj|_with_mqa|\.wq_b|\.wk)\.weight"))


def _nemotron_h(folder: Path) -> None:
    """Nemotron 3 Nano: the kinds of layers as a string."""
    config, letters = _config(folder), {"linear_attention": "M", "moe": "E", "full_attention": "*"}
    kinds = config.pop("layers_block_type")
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    config["num_hidden_layers"] = len(kinds)
    (folder / "config.json").write_text(json.dumps(config))


_LAYOUTS: dict[str, Callable[[Path], None]] = {
    "qwen3_5_moe_text": _qwen3_5_moe,
    "deepseek_v32": _deepseek_v32,
    "nemotron_h": _nemotron_h,
}
