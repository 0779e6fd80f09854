"""Stored tensors that the stock model does not read are named and left out; others without a place are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_family
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        arch: make_family(arch, tmp_path_factory.mktemp(arch), num_variants=1)["base"]
        for arch in ("mixtral", "deepseek_v3", "qwen3_moe")
    }


def with_tensors(source: Path, folder: Path, names: list[str]) -> Path:
    """A copy of a checkpoint that stores 8 bytes more under each name."""
    copy = Path(shutil.copytree(source, folder / "copy"))
    file = copy / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2) for name in names}, file)
    return copy


@pytest.mark.parametrize(
    ("arch", "names", "kind"),
    [
        ("mixtral", ["model.layers.1.self_attn.rotary_emb.inv_freq"], "rotary tables, which are computed"),
        ("mixtral", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached"], "rotary tables"),
        ("qwen3_moe", ["mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"], "multi-token prediction"),
        ("qwen3_moe", ["model.mtp_layers.0.eh_proj.weight"], "multi-token prediction"),
        ("deepseek_v3", ["model.layers.61.eh_proj.weight"], "multi-token prediction"),  # where the class expects it
        (
            "deepseek_v3",
            ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.down_proj.weight"],
            "multi-tok",
        ),
        ("mixtral", ["model.layers.2.enorm.weight", "model.layers.2.shared_head.head.weight"], "multi-token"),
    ],
)
def test_left_out(arch: str, names: list[str], kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    """A prediction layer was ignored at index 61 only, where the class of the largest DeepSeek-V3 expects it."""
    checkpoint = Checkpoint.open(with_tensors(made[arch], tmp_path, names), "x")
    assert set(checkpoint.ignored) == set(names)
    (note,) = checkpoint.notes
    for part in ("left out: ", min(names), kind, f"; {len(names)} in all, {8 * len(names)} B), which "):
        assert part in note
    assert set(checkpoint.target_names) == set(Checkpoint.open(made[arch], "y").target_names)


def test_kinds_are_told_apart(made: dict[str, Path], tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.norm.weight"]
    tables, prediction = Checkpoint.open(with_tensors(made["mixtral"], tmp_path, names), "x").notes
    assert "rotary tables" in tables
    assert "multi-token prediction" in prediction


@pytest.mark.parametrize(
    "name", ["model.layers.1.mystery.weight", "score.weight", "model.layers.0.mlp.mtpx_proj.weight", "v_head.weight"]
)
def test_anything_else_is_refused(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    path = with_tensors(made["mixtral"], tmp_path, [name])
    with pytest.raises(CheckpointError, match=f"^x: {path}: MixtralForCausalLM has no place for {name}.*without them"):
        Checkpoint.open(path, "x")


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_half_a_model_is_refused(arch: str, made: dict[str, Path], tmp_path: Path) -> None:
    """A whole layer beyond `num_hidden_layers` is no prediction layer: with a config.json that counts too few, the
    rest would be served."""
    path = with_tensors(made[arch], tmp_path, [])
    config = json.loads((path / "config.json").read_text())
    layers = config["num_hidden_layers"] - 1
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(CheckpointError, match=f"model.layers.{layers} is a layer like the others, .*_layers {layers};"):
        Checkpoint.open(path, "x")


def test_an_adapter_beside_the_weights(made: dict[str, Path], tmp_path: Path) -> None:
    path = with_tensors(made["mixtral"], tmp_path, [])
    (path / "adapter_config.json").write_text("{}")
    assert Checkpoint.open(path, "x").notes == [
        "adapter_config.json: an adapter lies beside the weights and is not applied"
    ]


def test_a_padded_vocabulary_that_the_config_does_not_know(made: dict[str, Path], tmp_path: Path) -> None:
    """Trainers pad embeddings to a multiple of 64 and forget config.json; transformers refuses it as well."""
    path = with_tensors(made["mixtral"], tmp_path, [])
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(16, tensors[name].shape[1])])
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \[128, 32\], .* \[112, 32\]. Set \"vocab_size\": 128 if"):
        Checkpoint.open(path, "x")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    Checkpoint.open(path, "x")


def test_a_head_that_is_the_embedding(made: dict[str, Path], tmp_path: Path) -> None:
    """The message about a missing head says how a tied one is told."""
    path = with_tensors(made["mixtral"], tmp_path, [])
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r'not stored: lm_head\.weight.*set "tie_word_embeddings": true'):
        Checkpoint.open(path, "x")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    Checkpoint.open(path, "x")
