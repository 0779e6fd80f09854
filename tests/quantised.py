"""Checkpoints turned into those that people download: the same folder with its weights in few bits.

Each `store_…` rewrites model.safetensors and config.json with real names and layouts, by the format's own library where
one quantises on a CPU. Routers, norms, embeddings and the head stay as they are, as they do there.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.integrations.mxfp4 import FP4_VALUES

_LINEAR = re.compile(r".*(_proj|\.w[123])\.weight")  # attention and experts


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    """`tensors` become the weights of `folder`, stored as `quantization` says."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantization}))


def store_block_fp8(folder: Path, block: tuple[int, int] = (8, 8)) -> None:
    """FP8 in blocks, as Qwen3-…-FP8 and DeepSeek-V3; a side that is no multiple of the block has a smaller last one."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    quantise = Fp8Quantize(
        SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=None))
    )
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if _LINEAR.fullmatch(name):
            rows, columns = weight.shape
            made = quantise._quantize_one(name, pad(weight, (0, -columns % block[1], 0, -rows % block[0])))
            stored[name] = made[name][:rows, :columns]
            stored[f"{name}_scale_inv"] = made[f"{name}_scale_inv"]
        else:
            stored[name] = weight
    rewrite(folder, stored, settings)


def store_mxfp4(folder: Path) -> None:
    """The experts of gpt-oss as OpenAI stores them: 4-bit floats, an exponent for 32 of them, matrices as [out, in]."""
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4(weight.float().transpose(1, 2))
        else:
            stored[name] = weight
    rewrite(
        folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    )


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[…, n] -> uint8 blocks […, n / 32, 16] and uint8 scales […, n / 32]; each value the nearest of its block."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor().clamp(-120, 120) - 2  # the largest FP4 value is 6
    levels = torch.tensor(FP4_VALUES)
    codes = (groups / exponent.exp2()[..., None])[..., None].sub(levels).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)
