"""What belongs together, what is identical, and how far the rest is apart."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_family, make_tokenizer
from polymoe.errors import CheckpointError, FamilyError
from polymoe.offline.checkpoint.family import Family, max_model_len, parse_variant_specs
from polymoe.offline.similarity.picture import heatmap
from polymoe.offline.similarity.scan import scan_family


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parse_variant_specs() -> None:
    assert parse_variant_specs(["b=/x=y", "a.1-_=org/model@v1"]) == {"b": "/x=y", "a.1-_": "org/model@v1"}


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (["a=x", "a=y"], "the name a is given twice"),
        (["a=x", "A=y"], "differ only in case"),
        (["justapath"], "'justapath' is not NAME=PATH"),
        (["a="], "is not NAME=PATH"),
        (["=x"], "'' is not a variant name"),
        (["..=x"], "is not a variant name"),
        (["a/b=x"], "is not a variant name"),
        (["é=x"], "is not a variant name"),
        (["a\n=x"], "is not a variant name"),
        ([65 * "a" + "=x"], "is not a variant name"),
    ],
)
def test_bad_specs(specs: list[str], reason: str) -> None:
    with pytest.raises(FamilyError, match=reason):
        parse_variant_specs(specs)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family("mixtral", tmp_path_factory.mktemp("trio"), tokenizer=True)


@pytest.fixture
def pair(trio: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Two variants that a test may change."""
    return {name: Path(shutil.copytree(trio[name], tmp_path / name)) for name in ("base", "v1")}


def test_open(trio: dict[str, Path]) -> None:
    family = Family.open([f"{name}={path}" for name, path in trio.items()])
    assert family.names == ("base", "v1", "v2")
    assert (family.vocab_size, family.vocab_sizes) == (112, (112, 112, 112))
    assert family.expert_bytes == 4 * 3 * 24 * 32
    assert family.num_bytes == sum(
        t.nbytes for path in trio.values() for t in load_file(path / "model.safetensors").values()
    )


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_scan_is_the_definition(arch: str, tmp_path: Path) -> None:
    paths = make_family(arch, tmp_path, num_variants=3, frozen=r"embed_tokens|q_proj|q_a_proj", frozen_experts=[1])
    family = Family.open(paths)
    scan = scan_family(family)
    info = family.architecture
    for layer in range(info.num_layers):
        for expert in range(info.num_experts):
            vectors = [
                torch.cat([c.tensor(info.expert_tensor(layer, t))[expert].flatten() for t in info.expert_shapes])
                for c in family.checkpoints
            ]
            distance = sum(float((a - b).norm()) for a, b in combinations(vectors, 2))
            assert scan.distance[layer, expert] == pytest.approx(distance, rel=1e-5)
            assert scan.norm[layer, expert] == pytest.approx(np.mean([float(v.norm()) for v in vectors]), rel=1e-5)
            assert scan.expert_same_as[:, layer, expert].tolist() == ([0, 0, 0] if expert == 1 else [0, 1, 2])
    assert scan.relative_distance == pytest.approx(scan.distance / (3 * scan.norm))
    assert (scan.distance[:, 1] == 0).all()
    assert set(scan.nonexpert_same_as) == set(info.nonexperts)
    frozen = {name for name, sources in scan.nonexpert_same_as.items() if sources == (0, 0, 0)}
    assert frozen == {n for n in info.nonexperts if any(part in n for part in ("embed_tokens", "q_proj", "q_a_proj"))}
    assert set(scan.nonexpert_same_as.values()) == {(0, 0, 0), (0, 1, 2)}
    assert scan.layer_names == (["1", "2"] if arch == "deepseek_v3" else [str(i) for i in range(info.num_layers)])


def test_distances_are_float32_also_for_bfloat16_weights(tmp_path: Path) -> None:
    """A bfloat16 distance of about 30 would come in steps of 1/8."""
    paths = make_family("mixtral", tmp_path, num_variants=2, perturb=0.01, dtype=torch.bfloat16)
    scan = scan_family(Family.open(paths))
    assert len(np.unique(scan.distance)) == scan.distance.size


def test_identical_between_some(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path, num_variants=3)
    shutil.copytree(paths["v1"], tmp_path / "again")
    scan = scan_family(Family.open(paths | {"again": tmp_path / "again"}))
    assert (scan.expert_same_as.reshape(4, -1) == np.array([[0], [1], [2], [1]])).all()
    assert set(scan.nonexpert_same_as.values()) == {(0, 1, 2, 1)}
    assert scan.nonexpert_bytes_total == 3 * sum(sizes[0] for sizes in scan.nonexpert_bytes.values())
    assert scan.weights_hash(3) == scan.weights_hash(1) != scan.weights_hash(0)


def test_names_do_not_matter_for_identity(tmp_path: Path) -> None:
    """The same weights under v4 and v5 names are the same variant."""
    old = make_family("mixtral", tmp_path / "old", num_variants=1)["base"]
    new = make_family("mixtral", tmp_path / "new", num_variants=1, save_v5_names=True)["base"]
    scan = scan_family(Family.open({"old": old, "new": new}))
    assert not scan.expert_same_as.any()
    assert not scan.distance.any()
    assert scan.weights_hash(0) == scan.weights_hash(1)


def test_one_variant_is_a_family(trio: dict[str, Path]) -> None:
    scan = scan_family(Family.open({"base": trio["base"]}))
    assert not scan.distance.any()
    assert not scan.relative_distance.any()


def test_no_variant_is_not() -> None:
    with pytest.raises(FamilyError, match="at least one"):
        Family.open([])


def test_nan_weights(pair: dict[str, Path]) -> None:
    file = pair["v1"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"v1: expert 2 of model\.layers\.1\.mlp\.experts\.gate_up_proj has NaN"):
        scan_family(Family.open(pair))


def test_different_architectures(trio: dict[str, Path], tmp_path: Path) -> None:
    other = make_family("qwen3_moe", tmp_path, num_variants=1)["base"]
    with pytest.raises(FamilyError, match="model_type is 'mixtral' in a and 'qwen3_moe' in b"):
        Family.open({"a": trio["base"], "b": other})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 in a and 3 in b"),
        ({"intermediate_size": 32}, "intermediate_size is 24 in a and 32 in b"),
        ({"num_local_experts": 6}, "num_local_experts is 4 in a and 6 in b"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 2 in a and 1 in b"),
        ({"sliding_window": 16}, "sliding_window is None in a and 16 in b"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ({"vocab_size": 112 + 1025}, "b has 1137"),
    ],
)
def test_what_must_agree(overrides: dict[str, Any], reason: str, trio: dict[str, Path], tmp_path: Path) -> None:
    other = make_family("mixtral", tmp_path, num_variants=1, **overrides)["base"]
    with pytest.raises(FamilyError, match=reason):
        Family.open({"a": trio["base"], "b": other})


def test_what_may_differ(pair: dict[str, Path]) -> None:
    edit_json(
        pair["v1"] / "config.json",
        **{"eos_token_id": [1, 2], "pad_token_id": 1, "attention_dropout": 0.1, "router_aux_loss_coef": 0.5},
        **{
            "output_router_logits": True,
            "use_cache": False,
            "initializer_range": 0.5,
            "transformers_version": "4.36.0",
        },
        **{"max_position_embeddings": 512, "unsloth_version": "2026.1"},
    )
    family = Family.open(pair)
    assert [max_model_len(c.config) for c in family.checkpoints] == [256, 512]


def grown(source: Path, out: Path, rows: int) -> Path:
    """A fine-tune that added `rows` tokens to its vocabulary."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(rows, tensors[name].shape[1])])
    save_file(tensors, out / "model.safetensors")
    edit_json(out / "config.json", vocab_size=112 + rows)
    return out


def test_added_vocabulary_rows(trio: dict[str, Path], tmp_path: Path) -> None:
    family = Family.open({"base": trio["base"], "grown": grown(trio["base"], tmp_path / "grown", 3)})
    assert (family.vocab_size, family.vocab_sizes) == (115, (112, 115))
    scan = scan_family(family)
    assert scan.nonexpert_same_as["lm_head.weight"] == (0, 1)
    assert scan.nonexpert_bytes["lm_head.weight"] == (112 * 32 * 4, 115 * 32 * 4)


def test_tokenizers_must_mean_the_same(pair: dict[str, Path]) -> None:
    content = json.loads((pair["v1"] / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = [token for token, index in vocab.items() if index in (50, 51)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (pair["v1"] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FamilyError, match=r"tokenizers differ: token 50 is .* in base and .* in v1"):
        Family.open(pair)


def test_tokens_added_by_fine_tunes_may_differ(pair: dict[str, Path]) -> None:
    for name, tag in (("base", "<|a|>"), ("v1", "<|b|>")):
        tokenizer = make_tokenizer(pair[name])
        tokenizer.add_special_tokens({"additional_special_tokens": [tag]})
        tokenizer.save_pretrained(pair[name])
    Family.open(pair)


def test_a_variant_without_tokenizer(pair: dict[str, Path]) -> None:
    (pair["v1"] / "tokenizer.json").unlink()
    Family.open(pair)


def test_heatmap_is_a_png(trio: dict[str, Path], tmp_path: Path) -> None:
    scan = scan_family(Family.open(trio))
    heatmap(scan, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
