"""Checkpoints are read as transformers reads them, and refused with the fix where they cannot be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from families import ARCHITECTURES, make_config, make_family
from polymoe.errors import CheckpointError, UnsupportedModelError
from polymoe.offline.checkpoint.architecture import build_on_meta, check_supported
from polymoe.offline.checkpoint.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("mixtral", tmp_path_factory.mktemp("mixtral"), num_variants=1)["base"]


@pytest.fixture
def copy(mixtral: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(mixtral, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def assert_reads_like_transformers(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path, "x")
    want = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert set(checkpoint.target_names) | set(checkpoint.tied) == set(want)
    for name in checkpoint.target_names:
        tensor = checkpoint.tensor(name)
        assert torch.equal(tensor, want[name]), name
        assert (tensor.dtype, tuple(tensor.shape)) == (checkpoint.dtype(name), checkpoint.shape(name))
        assert tensor.nbytes == checkpoint.num_bytes(name)
    return checkpoint


@pytest.mark.parametrize("v5_names", [False, True], ids=["v4_names", "v5_names"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensors_are_those_of_from_pretrained(arch: str, v5_names: bool, tmp_path: Path) -> None:
    path = make_family(arch, tmp_path, num_variants=1, save_v5_names=v5_names)["base"]
    stored = load_file(path / "model.safetensors")
    if arch == "mixtral":
        assert ("model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored) is not v5_names
        assert ("model.layers.0.mlp.experts.gate_up_proj" in stored) is v5_names
    checkpoint = assert_reads_like_transformers(path)
    info = checkpoint.architecture
    model = build_on_meta(checkpoint.config)
    for layer in range(info.num_layers):
        for tensor, shape in info.expert_shapes.items():
            assert checkpoint.shape(info.expert_tensor(layer, tensor)) == (info.num_experts, *shape)
    experts = {info.expert_tensor(layer, t) for layer in range(info.num_layers) for t in info.expert_shapes}
    tied = set(checkpoint.tied)
    assert experts | set(info.nonexperts) == set(model.state_dict()) - tied
    assert not experts & set(info.nonexperts)
    embeddings = model.get_input_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module is embeddings}
    assert (names | {"lm_head.weight"}) - tied <= set(info.vocab_tensors)


def test_architecture_info() -> None:
    config = make_config("deepseek_v3")
    info = check_supported(config, build_on_meta(config))
    assert info.expert_modules == ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts")  # layer 0 is dense
    assert (info.num_layers, info.num_experts, info.class_name) == (2, 8, "DeepseekV3ForCausalLM")
    assert info.expert_shapes == {"gate_up_proj": (32, 32), "down_proj": (32, 16)}
    assert info.expert_parameters == 32 * 32 + 32 * 16
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in info.nonexperts


def test_bfloat16_is_read_as_stored(tmp_path: Path) -> None:
    path = make_family("mixtral", tmp_path, num_variants=1, dtype=torch.bfloat16)["base"]
    assert assert_reads_like_transformers(path).tensor("model.norm.weight").dtype == torch.bfloat16


def test_sharded(tmp_path: Path) -> None:
    path = make_family("mixtral", tmp_path, num_variants=1, max_shard_size="20KB")["base"]
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert_reads_like_transformers(path)


def test_only_the_needed_shards_are_opened(tmp_path: Path) -> None:
    path = make_family("mixtral", tmp_path, num_variants=1, max_shard_size="20KB")["base"]
    checkpoint = Checkpoint.open(path, "x")
    checkpoint.tensor("model.norm.weight")
    assert len(checkpoint._files._handles) == 1


@pytest.mark.parametrize("stored", ["source", "target", "both"])
def test_tied_embeddings(stored: str, tmp_path: Path) -> None:
    """transformers stores the embedding only, older trainers both ends or only lm_head."""
    path = make_family("mixtral", tmp_path, num_variants=1, tie_word_embeddings=True)["base"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        if stored != "source":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if stored == "target":
            del tensors["model.embed_tokens.weight"]

    edit_tensors(path, change)
    checkpoint = assert_reads_like_transformers(path)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.target_names
    assert checkpoint.architecture.vocab_tensors == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_and_stored_twice_with_equal_values(dtype: torch.dtype, tmp_path: Path) -> None:
    """Equal in the less precise dtype of the two: some trainers keep the head in float32."""
    path = make_family("mixtral", tmp_path, num_variants=1, tie_word_embeddings=True, dtype=torch.bfloat16)["base"]
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone().to(dtype)}))
    checkpoint = Checkpoint.open(path, "x")
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.notes == []


def test_tied_but_stored_with_different_values(tmp_path: Path) -> None:
    """transformers then ties nothing and says so; this was refused."""
    path = make_family("mixtral", tmp_path, num_variants=1, tie_word_embeddings=True)["base"]
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    checkpoint = assert_reads_like_transformers(path)
    assert checkpoint.tied == {}
    assert "lm_head.weight" in checkpoint.architecture.nonexperts
    assert ['"tie_word_embeddings": false would say so' in note for note in checkpoint.notes] == [True]


def test_not_a_checkpoint(tmp_path: Path, copy: Path) -> None:
    for spec in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        with pytest.raises(CheckpointError, match="is not a directory"):
            Checkpoint.open(spec, "x")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Checkpoint.open(copy / "config.json", "x")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path, "x")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter; give it with its base"):
        Checkpoint.open(tmp_path, "x")


def test_no_weights_and_pickles(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint.open(copy, "x")
    (copy / "pytorch_model.bin").write_bytes(b"never loaded")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        Checkpoint.open(copy, "x")


def test_truncated_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"copy/model\.safetensors: truncated: .* promises \d+ bytes, the file has"
    ):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(copy: Path, file: str) -> None:
    edit_json(copy / file, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(CheckpointError, match=f"{file} asks for custom code"):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_broken_config(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(copy, "x")


def test_left_over_tensor(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"model.layers.0.mystery.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"no place for model\.layers\.0\.mystery\.weight"):
        Checkpoint.open(copy, "x")


def test_documented_extras_are_ignored_and_reported(tmp_path: Path) -> None:
    """DeepSeek-V3 ships a multi-token-prediction layer, which transformers' class declares as not loaded."""
    path = make_family("deepseek_v3", tmp_path, num_variants=1)["base"]
    extras = {
        "model.layers.61.eh_proj.weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    edit_tensors(path, lambda t: t.update(extras))
    assert set(assert_reads_like_transformers(path).ignored) == set(extras)


def test_missing_tensor(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"not stored: model\.norm\.weight"):
        Checkpoint.open(copy, "x")


def test_missing_expert(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.1.w2.weight"))
    with pytest.raises(CheckpointError, match="numbered 0, 2, 3; experts are missing in between"):
        Checkpoint.open(copy, "x")


def test_missing_last_expert(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(
        CheckpointError, match=r"experts\.down_proj has shape \[3, 32, 24\], config\.json asks for \[4, 32, 24\]"
    ):
        Checkpoint.open(copy, "x")


def test_one_expert_of_another_shape(copy: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit_tensors(copy, lambda t: t.update({name: t[name][:, :-1].contiguous()}))
    with pytest.raises(CheckpointError, match=r"cannot be combined into model\.layers\.1\.mlp\.experts\.down_proj"):
        Checkpoint.open(copy, "x")


def test_wrong_shape(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\], config\.json asks for \[32\]"):
        Checkpoint.open(copy, "x")


def test_stored_under_both_names(copy: Path) -> None:
    """transformers itself would silently take one of the two."""
    name = "model.layers.0.mlp.experts.down_proj"
    edit_tensors(copy, lambda t: t.update({name: torch.zeros(4, 32, 24)}))
    with pytest.raises(CheckpointError, match=f"all become {name}; the checkpoint stores it twice"):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors(copy: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(copy, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(UnsupportedModelError, match=f"{name} is stored as .*does not say how"):
        Checkpoint.open(copy, "x")


def test_quantised_config(copy: Path) -> None:
    edit_json(copy / "config.json", quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(hqq\), which is not read"):
        Checkpoint.open(copy, "x")


class TestShards:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        return make_family("mixtral", tmp_path, num_variants=1, max_shard_size="20KB")["base"]

    def index(self, folder: Path) -> dict[str, str]:
        found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        return found

    def write(self, folder: Path, weight_map: object) -> None:
        edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)

    def test_missing_shard(self, sharded: Path) -> None:
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"names {shard.name}, which is missing"):
            Checkpoint.open(sharded, "x")

    @pytest.mark.parametrize("stale_in", ["earlier", "later"])
    def test_a_stale_copy_in_another_shard(self, sharded: Path, stale_in: str) -> None:
        """The index decides. transformers reads the last shard; where that is the stale one the note says so."""
        first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
        good, stale = (second, first) if stale_in == "earlier" else (first, second)
        name, value = next(iter(load_file(good).items()))
        save_file(load_file(stale) | {name: torch.zeros_like(value)}, stale)
        checkpoint = Checkpoint.open(sharded, "x")
        assert torch.equal(checkpoint._files.load(name), value)
        (note,) = checkpoint.notes
        assert f"{name} is stored again in {stale.name}; the copy in {good.name} is read" in note
        assert ("transformers itself takes" in note) == (stale_in == "later")

    def test_a_tensor_that_the_index_does_not_name(self, sharded: Path) -> None:
        """transformers reads whole shards."""
        weight_map = self.index(sharded)
        weight_map.pop("model.norm.weight")
        self.write(sharded, weight_map)
        assert_reads_like_transformers(sharded)

    def test_a_tensor_in_another_shard_than_the_index_says(self, sharded: Path) -> None:
        weight_map = self.index(sharded)
        wrong = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
        self.write(sharded, weight_map | {"model.norm.weight": wrong})
        (note,) = assert_reads_like_transformers(sharded).notes
        assert note.startswith(f"model.safetensors.index.json says that {wrong} holds model.norm.weight; it is read")

    def test_files_that_the_index_does_not_name(self, sharded: Path) -> None:
        save_file({"model.norm.weight": torch.zeros(32)}, sharded / "consolidated.safetensors")
        (note,) = assert_reads_like_transformers(sharded).notes
        assert note.startswith("model.safetensors.index.json names other files; left out: consolidated.safetensors (")

    def test_a_single_file_beside_shards(self, sharded: Path, mixtral: Path) -> None:
        shutil.copy(mixtral / "model.safetensors", sharded)
        (note,) = assert_reads_like_transformers(sharded).notes
        assert note.startswith("model.safetensors is read alone, as transformers does; left out: model-00001-of-00009")

    def test_index_promises_too_much(self, sharded: Path) -> None:
        weight_map = self.index(sharded)
        self.write(sharded, weight_map | {"model.extra": next(iter(weight_map.values()))})
        with pytest.raises(CheckpointError, match=r"holds model\.extra, but it does not"):
            Checkpoint.open(sharded, "x")

    @pytest.mark.parametrize("weight_map", [None, {}, [], {"a": "../outside.safetensors"}])
    def test_bad_index(self, sharded: Path, weight_map: object) -> None:
        self.write(sharded, weight_map)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            Checkpoint.open(sharded, "x")


class TestHub:
    """No hub is reachable in tests: a cache as the hub client lays it out, and HF_HUB_OFFLINE."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cache(self, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        repo = tmp_path / "hub" / "models--acme--tiny-moe"
        snapshot = repo / "snapshots" / self.COMMIT
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        for number, file in enumerate(sorted(mixtral.iterdir())):
            shutil.copy(file, repo / "blobs" / str(number))
            (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
        (repo / "refs").mkdir()
        for ref in ("main", "v1.0"):
            (repo / "refs" / ref).write_text(self.COMMIT)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        return snapshot

    @pytest.mark.parametrize("spec", ["acme/tiny-moe", "acme/tiny-moe@v1.0", f"acme/tiny-moe@{COMMIT}"])
    def test_cached_model(self, cache: Path, mixtral: Path, spec: str) -> None:
        checkpoint = Checkpoint.open(spec, "x")
        assert (checkpoint.spec, checkpoint.path) == (spec, cache)
        assert torch.equal(checkpoint.tensor("lm_head.weight"), Checkpoint.open(mixtral, "y").tensor("lm_head.weight"))

    @pytest.mark.parametrize("spec", ["acme/other", "acme/tiny-moe@nope"])
    @pytest.mark.usefixtures("cache")
    def test_not_in_the_cache(self, spec: str) -> None:
        with pytest.raises(CheckpointError, match=f"{spec} is not a directory here and cannot be downloaded"):
            Checkpoint.open(spec, "x")

    @pytest.mark.usefixtures("cache")
    def test_a_directory_wins(self, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(mixtral, tmp_path / "acme" / "tiny-moe")
        monkeypatch.chdir(tmp_path)
        assert Checkpoint.open("acme/tiny-moe", "x").path == tmp_path / "acme" / "tiny-moe"


TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("llama", TINY, r"LlamaConfig \(model_type llama\) cannot be served: it has no routed experts.*dense"),
        ("diffusion_gemma", {}, "ForBlockDiffusion is not a model that writes text token by token"),
        (
            "t5",
            {"d_model": 16, "num_layers": 2, "num_heads": 2},
            r"\(model_type t5\) cannot be served: .*encoder-decoder",
        ),
        (
            "nllb-moe",
            {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
            "encoder-decoder .* without the routed",
        ),
        ("whisper", {}, "no text-generation model"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(
    model_type: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type, **fields).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=reason):
        Checkpoint.open(tmp_path, "x")


def test_unknown_model_type(copy: Path) -> None:
    edit_json(copy / "config.json", model_type="hyper_moe_9000")
    with pytest.raises(UnsupportedModelError, match=r"config\.json: transformers cannot read it"):
        Checkpoint.open(copy, "x")
