"""Random families of real shapes for benchmarks: speed does not depend on the values of weights.

Routing of random weights is near uniform, unlike a trained router's; every report says so.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from polymoe.bench.written_family import (
    GRANITE_1B,
    QWEN3_5_HYBRID,
    QWEN3_128E,
    SWITCH_BASE_8,
    TINY_GRANITE,
    TINY_HYBRID,
    TINY_QWEN3,
    TINY_SWITCH,
    write_variant,
)
from polymoe.bundle.atomic import new_folder
from polymoe.errors import PlanError

# 430M parameters: what one batch on a few CPU cores can show of a Mixtral.
SMALL_MIXTRAL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
# 110M parameters: 64 variants of it are 14 GB of checkpoints.
MANY_MIXTRAL: dict[str, Any] = {
    **SMALL_MIXTRAL,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
# Seconds for the whole benchmark: to try the commands, and for the tests. Its figures mean nothing.
TINY_MIXTRAL: dict[str, Any] = {
    **SMALL_MIXTRAL,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 32: the least that vLLM has on a CPU
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
_WRITTEN = {
    "granite-1b-a400m": GRANITE_1B,
    "qwen3-128e": QWEN3_128E,
    "qwen3.5-hybrid": QWEN3_5_HYBRID,
    "granite-tiny": TINY_GRANITE,
    "hybrid-tiny": TINY_HYBRID,
    "qwen3-tiny": TINY_QWEN3,
    "switch-base-8": SWITCH_BASE_8,
    "switch-tiny": TINY_SWITCH,
}
SHAPES = {"430m": SMALL_MIXTRAL, "110m": MANY_MIXTRAL, "tiny": TINY_MIXTRAL, **_WRITTEN}


def cached_family(root: Path, num_variants: int, shape: str) -> dict[str, Path]:
    """Variant name -> checkpoint of a shape in `SHAPES`, made below `root` once and found again later."""
    digest = hashlib.sha256(json.dumps(SHAPES[shape], sort_keys=True).encode()).hexdigest()[:8]
    folder = root / (f"{shape}-{digest}" if shape in _WRITTEN else f"mixtral-{shape}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    if shape in _WRITTEN:
        return make_written_family(folder, num_variants, SHAPES[shape])
    return make_random_family(folder, num_variants, SHAPES[shape])


def make_written_family(folder: Path, num_variants: int, shape: dict[str, Any]) -> dict[str, Path]:
    """Variant name -> checkpoint that `write_variant` made; those that are there already are kept."""
    paths = {f"v{i}": folder / f"v{i}" for i in range(num_variants)}
    for index, path in enumerate(paths.values()):
        if not (path / "config.json").exists():
            _make_whole(path, partial(write_variant, index=index, shape=shape))
    return paths


def make_random_family(folder: Path, num_variants: int = 4, shape: dict[str, Any] | None = None) -> dict[str, Path]:
    """Variant name -> checkpoint (bfloat16 Mixtral of `shape`); those that are there already are kept.

    Variants are a base with 2 % noise, as real fine-tunes are close to theirs.
    """
    paths = {f"v{i}": folder / f"v{i}" for i in range(num_variants)}
    missing = {i: path for i, path in enumerate(paths.values()) if not (path / "config.json").exists()}
    if not missing:
        return paths
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**(shape or SMALL_MIXTRAL))
    torch.manual_seed(0)
    base = MixtralForCausalLM(config).to(torch.bfloat16)
    for index, path in missing.items():
        generator = torch.Generator().manual_seed(index)
        variant = MixtralForCausalLM(config).to(torch.bfloat16)
        for target, source in zip(variant.parameters(), base.parameters(), strict=True):
            noise = torch.randn(source.shape, generator=generator) * 0.02 * source.detach().float().std()
            target.data.copy_(source.detach().float() + noise)
        _make_whole(path, variant.save_pretrained)
    return paths


def _make_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A checkpoint that is there once it is finished. Of two benchmarks that make the same, the first one's stays."""
    try:
        with new_folder(path, overwrite=False) as folder:
            write(folder)
    except PlanError:
        if not (path / "config.json").exists():
            raise
