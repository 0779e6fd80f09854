"""Members saved in different dtypes are cast to one, and heads tied in some members only are untied."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import make_family
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.engine.core import EngineCore
from polymoe.errors import CheckpointError
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import scan_family

WINDOW = torch.randint(0, 112, (1, 30), generator=torch.Generator().manual_seed(1))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def mixed(folder: Path, *dtypes: torch.dtype, arch: str = "mixtral") -> dict[str, Path]:
    """One family whose members are saved in different dtypes."""
    paths = {}
    for index, dtype in enumerate(dtypes):
        made = make_family(arch, folder / str(index), num_variants=len(dtypes), dtype=dtype)
        name = list(made)[index]
        paths[name] = made[name]
    return paths


def served_logits(paths: dict[str, Path], folder: Path, printed: Console | None = None) -> list[torch.Tensor]:
    make_plan(paths, "separate", None, folder / "bundle", console=printed)
    engine = EngineCore(
        EngineConfig(bundle=str(folder / "bundle"), device="cpu", dtype="float32", num_kv_blocks=40, num_threads=1)
    )
    return engine.prompt_logits([(v, WINDOW[0].tolist()) for v in range(len(paths))])


@torch.no_grad()
def stock_logits(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """In float32, of weights that went through `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").float().eval()
    logits: torch.Tensor = model(WINDOW, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("dtypes", [(BF16, F32, F16), (F32, BF16, F16), (F16, F32)])
def test_members_in_different_dtypes(arch: str, dtypes: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    """They were refused. Each is served as its weights are after the cast."""
    paths = mixed(tmp_path, *dtypes, arch=arch)
    for logits, path in zip(served_logits(paths, tmp_path), paths.values(), strict=True):
        assert torch.allclose(logits, stock_logits(path, dtypes[0]), atol=1e-4)
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    assert {variant.dtype for variant in bundle.variants} == {str(dtypes[0]).removeprefix("torch.")}


def test_what_a_cast_loses_is_said(tmp_path: Path) -> None:
    paths = mixed(tmp_path, BF16, F32)
    printed = Console(record=True, width=400)
    served_logits(paths, tmp_path, printed)
    text = printed.export_text()
    assert "v1: cast to the dtype of the family, which is that of base: 21 tensors from float32 to bfloat16." in text
    assert re.search(r"v1: the cast rounded \d+\.\d% of the values; `separate` is exact for the rounded weights", text)
    assert "name it before base, at the bytes of the wider dtype" in text


def test_a_float32_copy_of_bfloat16_weights_loses_nothing(tmp_path: Path) -> None:
    """Trainers upcast; the same experts are then shared whatever dtype holds them."""
    base = make_family("mixtral", tmp_path, num_variants=1, dtype=BF16)["base"]
    AutoModelForCausalLM.from_pretrained(base, dtype=F32).save_pretrained(tmp_path / "copy")
    family = Family.open({"base": base, "copy": tmp_path / "copy"})
    scan = scan_family(family)
    assert family.rounding_notes == ["copy: the cast lost nothing."]
    assert not scan.expert_same_as.any()
    assert set(scan.nonexpert_same_as.values()) == {(0, 0)}


def test_wider_first_loses_nothing(tmp_path: Path) -> None:
    paths = mixed(tmp_path, BF16, F32)
    family = Family.open({"v1": paths["v1"], "base": paths["base"]})
    scan_family(family)
    assert family.rounding_notes == ["base: the cast lost nothing."]
    assert family.checkpoints[1].dtype("model.layers.0.mlp.experts.down_proj") == F32


def test_values_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    """70000 is infinite in float16; the message blamed the file."""
    paths = mixed(tmp_path, F16, BF16)
    file = paths["v1"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][0, 0] = 70000
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=r"^v1: .*down_proj has values up to 7\.01e\+04, too large for float16"
    ) as raised:
        scan_family(Family.open(paths))
    assert "name this variant first" in str(raised.value)


def test_one_member_in_two_dtypes(tmp_path: Path) -> None:
    """A trainer kept one layer's experts in float32; transformers loads them all in one dtype."""
    path = make_family("mixtral", tmp_path, num_variants=1, num_hidden_layers=3, dtype=BF16)["base"]
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "layers.0.block_sparse_moe.experts" in name:
            tensors[name] = tensors[name].float()
    save_file(tensors, file)
    (logits,) = served_logits({"base": path}, tmp_path)
    assert torch.allclose(logits, stock_logits(path, BF16), atol=1e-4)


def test_nonexperts_of_one_dtype_more_precise(tmp_path: Path) -> None:
    """Where the experts agree nothing needs a cast: a router kept in float32 stays what it is."""
    paths = make_family("mixtral", tmp_path, num_variants=2, dtype=BF16)
    file = paths["v1"] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    tensors[name] = tensors[name].float() + 1e-5
    save_file(tensors, file)
    family = Family.open(paths)
    assert family.notes == []
    assert torch.equal(family.checkpoints[1].tensor("model.layers.0.mlp.gate.weight"), tensors[name])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_heads_tied_in_some_members(order: tuple[int, ...], tmp_path: Path) -> None:
    """A base with a tied head, a fine-tune that unties it, and one whose config.json still says tied although its own
    head is stored (adapters merged into the head): all are the models that transformers loads."""
    made = make_family("granitemoe", tmp_path / "tied", num_variants=3, tie_word_embeddings=True)
    made["v1"] = make_family("granitemoe", tmp_path / "untied", num_variants=2)["v1"]
    file = made["v2"] / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}, file)
    paths = {name: made[name] for name in (list(made)[index] for index in order)}
    assert json.loads((paths["v2"] / "config.json").read_text())["tie_word_embeddings"]
    printed = Console(record=True, width=400)
    got = served_logits(paths, tmp_path, printed)
    for logits, path in zip(got, paths.values(), strict=True):
        assert torch.allclose(logits, stock_logits(path, F32), atol=1e-4)
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in pairwise(got))
    text = printed.export_text()
    assert "base: its output head is tied to its embedding; it is served with a copy, since" in text
    assert "v2: config.json ties lm_head.weight to model.embed_tokens.weight, but" in text
