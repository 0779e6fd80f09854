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
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
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


def store_block_fp8(folder: Path, block: tuple[int, int] = (8, 8), linear: re.Pattern[str] = _LINEAR) -> None:
    """FP8 in blocks, as Qwen3-…-FP8 and DeepSeek-V3; a side that is no multiple of the block has a smaller last one."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    quantise = Fp8Quantize(
        SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=None))
    )
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if linear.fullmatch(name):
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


# Kinds that llm-compressor writes: name -> (format, arguments of its weights)
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "int8_channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4_group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    "int4_zeros": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False},
    ),
    "int8_packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
    ),
}


def store_compressed(folder: Path, kind: str) -> None:
    """As llm-compressor saves the model, quantised to the nearest value without data."""
    layout, arguments = COMPRESSED[kind]
    arguments = {"symmetric": True, "dynamic": False, **arguments}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=layout)
    if layout in ("float-quantized", "int-quantized"):  # W8A8, which a dequantised model does not do
        scheme.input_activations = QuantizationArgs(num_bits=8, type=arguments["type"], strategy="token", dynamic=True)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, quantization_status="compressed", ignore=["lm_head"]
    )
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not _LINEAR.fullmatch(name):
            stored[name] = weight
            continue
        parts = compressor.compress({"weight": weight, **_scales(weight, scheme.weights)}, scheme)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    rewrite(folder, stored, config.model_dump(mode="json", exclude_none=True))


def store_int4(folder: Path) -> None:
    store_compressed(folder, "int4_group")


def _scales(weight: Tensor, arguments: Any) -> dict[str, Tensor]:
    groups = {"tensor": weight.reshape(1, -1), "channel": weight}.get(arguments.strategy)
    if groups is None:
        groups = weight.unflatten(-1, (-1, arguments.group_size))
    least, most = (
        groups.amin(-1, keepdim=arguments.strategy != "tensor" and groups.ndim == 2),
        groups.amax(-1, keepdim=arguments.strategy != "tensor" and groups.ndim == 2),
    )
    found = {}
    if arguments.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zeros = calculate_qparams(least, most, arguments, found.get("weight_global_scale"))
    found["weight_scale"] = scale.to(weight.dtype if arguments.type == "int" else scale.dtype)
    return found if arguments.symmetric else found | {"weight_zero_point": zeros.to(torch.int8)}


def store_gptq(
    folder: Path, bits: int = 4, group: int = 8, act_order: bool = True, version: int = 1
) -> dict[str, Tensor]:
    """As GPTQModel packs a model; with `act_order` the inputs of a group lie apart. Returns what the weights became."""
    generator, made, stored = torch.Generator().manual_seed(0), {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not _LINEAR.fullmatch(name):
            stored[name] = weight
            continue
        inputs = weight.shape[1]
        group_of = torch.arange(inputs) // group
        if act_order:
            group_of = group_of[torch.randperm(inputs, generator=generator)]
        scale, zero, codes = integers(weight, group_of, bits, least_zero=1)
        module = name.removesuffix("weight")
        stored[f"{module}qweight"] = pack(codes.T.contiguous(), bits, axis=0)
        stored[f"{module}qzeros"] = pack(zero.T - int(version == 1), bits, axis=1)
        stored[f"{module}scales"], stored[f"{module}g_idx"] = scale.T.half(), group_of.int()
        made[name] = ((codes - zero[:, group_of]) * scale.half().float()[:, group_of]).to(weight.dtype)
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False}
    rewrite(folder, stored, settings | {"checkpoint_format": layout})
    return made


def store_awq(folder: Path, group: int = 8) -> dict[str, Tensor]:
    """As AutoAWQ packs a model. Returns what the weights became."""
    order, made, stored = [0, 2, 4, 6, 1, 3, 5, 7], {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not _LINEAR.fullmatch(name):
            stored[name] = weight
            continue
        group_of = torch.arange(weight.shape[1]) // group
        scale, zero, codes = integers(weight, group_of, 4)
        module = name.removesuffix("weight")
        for leaf, values in (("qweight", codes.T), ("qzeros", zero.T)):
            shuffled = values.unflatten(-1, (-1, 8))[..., order].flatten(-2)
            stored[f"{module}{leaf}"] = pack(shuffled, 4, axis=1)
        stored[f"{module}scales"] = scale.T.half()
        made[name] = ((codes - zero[:, group_of]) * scale.half().float()[:, group_of]).to(weight.dtype)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    rewrite(folder, stored, settings)
    return made


def integers(weight: Tensor, group_of: Tensor, bits: int, least_zero: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> scale [out, groups], zero [out, groups] and codes [out, in]: the nearest of 2 ** bits levels."""
    most = (1 << bits) - 1
    columns = [weight.float()[:, group_of == g] for g in range(int(group_of.max()) + 1)]
    low = torch.stack([c.amin(1).clamp(max=0) for c in columns], 1)
    high = torch.stack([c.amax(1).clamp(min=0) for c in columns], 1)
    scale = ((high - low) / most).half().float()
    zero = (-low / scale).round().clamp(least_zero, most).int()
    codes = (weight.float() / scale[:, group_of]).round().int() + zero[:, group_of]
    return scale, zero, codes.clamp(0, most)


def pack(values: Tensor, bits: int, axis: int) -> Tensor:
    """Integers -> int32 along `axis`, the lowest bits first; one by one, as the format is written down."""
    places = 32 // bits
    parts = [values.long().movedim(axis, -1)[..., i::places] << bits * i for i in range(places)]
    whole = torch.stack(parts).sum(0)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32).movedim(-1, axis).contiguous()
