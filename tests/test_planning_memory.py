"""Planning a family that is stored in fewer bits needs no more memory than planning the same in bfloat16."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_family
from polymoe.offline.api import make_plan
from quantised import store_block_fp8, store_mxfp4

SLACK = 8 << 20  # what the allocator happens to keep
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "fp8": (
        "qwen3_moe",
        {"moe_intermediate_size": 512, "num_experts": 12, "mlp_only_layers": []},
        lambda folder: store_block_fp8(folder, (128, 128)),
    ),
    "mxfp4": ("gpt_oss", {"intermediate_size": 512, "num_local_experts": 12}, store_mxfp4),
}


def status(kind: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) << 10


def peak(paths: dict[str, Path], out: Path) -> int:
    """Bytes that the resident set grows by at most while the family is planned."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    make_plan(paths, "separate", None, out)
    return status("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_fewer_bits_need_no_more_memory(kind: str, tmp_path: Path) -> None:
    arch, fields, store = FAMILIES[kind]
    paths = make_family(arch, tmp_path / "family", 2, dtype=torch.bfloat16, **SIZES, **fields)
    make_plan(paths, "separate", None, tmp_path / "first")  # what is loaded once is loaded now
    plain = peak(paths, tmp_path / "plain")
    for path in paths.values():
        store(path)
    assert plain > 32 << 20
    assert peak(paths, tmp_path / "packed") <= plain + SLACK
