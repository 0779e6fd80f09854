"""BASE+ADAPTER and BASE+PATCH: what PEFT merges, and what a trainer changed, read as if it were a whole checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import make_family
from polymoe import LLM, SamplingParams
from polymoe.bundle.tensor_file import raw_bytes
from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.errors import CheckpointError
from polymoe.evaluate.report import run_eval
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.loaded_model import loaded_model
from polymoe.offline.checkpoint.place import Place
from quantised import store_block_fp8, store_int4

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> checkpoint; `mixtral_v5` has the names of transformers 5, `fp8` its weights in FP8."""
    made = {
        arch: make_family(arch, tmp_path_factory.mktemp(arch), num_variants=1)["base"]
        for arch in ("mixtral", "qwen3_moe", "gpt_oss")
    }
    v5 = make_family("mixtral", tmp_path_factory.mktemp("v5"), num_variants=1, save_v5_names=True)["base"]
    fp8 = make_family("qwen3_moe", tmp_path_factory.mktemp("fp8"), num_variants=1)["base"]
    store_block_fp8(fp8)
    return made | {"mixtral_v5": v5, "fp8": fp8}


def make_adapter(base: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    """A random adapter of `base`, saved in `out`. Returns the weights that PEFT merges."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | settings)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise if "magnitude" not in name else noise.abs())
    peft.save_pretrained(out)
    merged: dict[str, Tensor] = peft.merge_and_unload().state_dict()
    return merged


def assert_reads(spec: str, want: dict[str, Tensor]) -> Checkpoint:
    checkpoint = Checkpoint.open(spec, "x")
    assert set(checkpoint.target_names) == set(want)
    for name in checkpoint.target_names:
        torch.testing.assert_close(checkpoint.tensor(name), want[name], atol=1e-5, rtol=1e-5, msg=name)
    return checkpoint


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("mixtral", {"target_modules": ATTENTION}),
        ("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
        ("mixtral_v5", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True}),
        ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),  # [in, out], with biases
        ("gpt_oss", {"target_modules": [], "target_parameters": EXPERTS[:1]}),
        ("qwen3_moe", {"target_modules": ATTENTION, "use_dora": True}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("qwen3_moe", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen3_moe", {"target_modules": ["embed_tokens"], "use_dora": True}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
        (
            "mixtral",
            {
                "target_modules": ATTENTION,
                "target_parameters": EXPERTS,
                "rank_pattern": {"q_proj": 2, r"layers\.1\..*gate_up_proj": 3},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "down_proj": 1},
                "use_rslora": True,
            },
        ),
        ("fp8", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    ],
)
def test_lora_is_merged_as_peft_merges_it(
    arch: str, settings: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    want = make_adapter(bases[arch], tmp_path / "adapter", **settings)
    plain = Checkpoint.open(bases[arch], "base")
    checkpoint = assert_reads(f"{bases[arch]}+{tmp_path / 'adapter'}", want)
    changed = [name for name in plain.target_names if not torch.equal(plain.tensor(name), checkpoint.tensor(name))]
    assert 0 < len(changed) < len(plain.target_names)


@pytest.mark.parametrize("base", ["mixtral", "mixtral_v5"])
def test_adapters_of_single_experts(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Trained with transformers 4, where each expert was a module; PEFT itself makes stacked ones of them."""
    generator, tensors, sizes = torch.Generator().manual_seed(0), {}, {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}
    for layer in range(2):
        for expert in range(4):
            for part, (rows, columns) in sizes.items():
                name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(3, columns, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 3, generator=generator)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3"]}
    adapter = write_adapter(tmp_path / "adapter", tensors, config)
    model = AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float32)
    assert_reads(f"{bases[base]}+{adapter}", PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_patch(base: Path, file: Path, names: list[str], dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Change a tenth of the values of `names` in `base`. Returns the changed tensors."""
    generator, parts, made = torch.Generator().manual_seed(1), {}, {}
    stored = load_file(base / "model.safetensors")
    for name in names:
        tensor = stored[name]
        places = torch.randperm(tensor.numel(), generator=generator)[: tensor.numel() // 10]
        values = torch.randn(len(places), generator=generator).to(tensor.dtype)
        parts[f"{name}.indices"], parts[f"{name}.values"] = places.to(dtype), values
        parts[f"{name}.shape"] = torch.tensor(tensor.shape)
        parts[f"{name}.sha256"] = torch.tensor(list(hashlib.sha256(raw_bytes(tensor)).digest()), dtype=torch.uint8)
        made[name] = tensor.flatten().index_put((places,), values).reshape(tensor.shape)
    save_file(parts, file)
    return made


EXPERT, QUERY = "model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_patch(dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path) -> None:
    base, file = bases["qwen3_moe"], tmp_path / "step+100.safetensors"  # a + of its own
    made = make_patch(base, file, [EXPERT, QUERY], dtype)
    plain, checkpoint = Checkpoint.open(base, "base"), Checkpoint.open(f"{base}+{file}", "x")
    want = {name: plain.tensor(name) for name in plain.target_names}
    want[QUERY] = made[QUERY]
    want["model.layers.0.mlp.experts.gate_up_proj"][3, 16:] = made[EXPERT]
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in want.items())


@pytest.mark.parametrize("base", ["mixtral", "mixtral_v5"])  # which hold the same weights
def test_patch_in_the_stock_models_names(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    made = make_patch(bases["mixtral_v5"], tmp_path / "p.safetensors", [name])
    checkpoint = Checkpoint.open(f"{bases[base]}+{tmp_path / 'p.safetensors'}", "x")
    assert torch.equal(checkpoint.tensor(name), made[name])


def test_a_family_of_changes_is_planned_served_and_measured(tmp_path: Path) -> None:
    """An int4 base, an adapter on it and a patch of it: one bundle, each variant exactly its original."""
    base = make_family("qwen3_moe", tmp_path, num_variants=1, tokenizer=True)["base"]
    store_int4(base)
    parts = {"indices": torch.arange(0, 2048, 9), "values": torch.full((228,), 0.5), "shape": torch.tensor([64, 32])}
    save_file({f"{QUERY}.{leaf}": tensor for leaf, tensor in parts.items()}, tmp_path / "p.safetensors")
    write_adapter(
        tmp_path / "a",
        {
            "base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.randn(2 * 8, 16),
            "base_model.model.model.layers.0.mlp.experts.lora_B.weight": torch.randn(32, 2 * 8),
        },
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"]},
    )
    specs = {"base": str(base), "lora": f"{base}+{tmp_path / 'a'}", "patch": f"{base}+{tmp_path / 'p.safetensors'}"}
    bundle = make_plan(specs, "separate", None, tmp_path / "bundle").path
    prompt = [5, 9, 33, 70, 12, 8]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    served = LLM(bundle, dtype="float32", device="cpu").generate([prompt] * 3, params, variants=list(specs))
    answers = []
    for output, (name, spec) in zip(served, specs.items(), strict=True):
        model = loaded_model(Checkpoint.open(spec, name), torch.float32)
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(ids[0, len(prompt) :].tolist())
        assert output.outputs[0].token_ids == answers[-1], name
    assert answers[0] != answers[1] != answers[2]
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    texts = dict.fromkeys(specs, tmp_path / "text.txt")
    config = EngineConfig(bundle=str(bundle), dtype="float32", device="cpu", enable_prefix_caching=False)
    report = run_eval(config, texts, {}, 32, 4, 2, Console(quiet=True))
    assert all(row["kl"] < 1e-6 and row["top1_agreement"] == 1 for row in report["variants"].values())


def test_a_chain(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["qwen3_moe"]
    merged = make_adapter(base, tmp_path / "a", target_modules=["v_proj"])
    made = make_patch(base, tmp_path / "p.safetensors", [QUERY])
    place = Place.find(f"{base}+{tmp_path / 'a'}+{tmp_path / 'p.safetensors'}")
    assert place.changes == (tmp_path / "a", tmp_path / "p.safetensors")
    checkpoint = Checkpoint.open(str(place), "x")
    assert torch.equal(checkpoint.tensor(QUERY), made[QUERY])
    value = "model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(checkpoint.tensor(value), merged[value])
    twice = Checkpoint.open(f"{base}+{tmp_path / 'a'}+{tmp_path / 'a'}", "x").tensor(value)
    plain = Checkpoint.open(base, "x").tensor(value)
    torch.testing.assert_close(twice, plain + 2 * (merged[value] - plain))


def test_the_original_that_eval_runs(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["qwen3_moe"]
    merged = make_adapter(base, tmp_path / "a", target_modules=["v_proj"], target_parameters=EXPERTS)
    model = loaded_model(Checkpoint.open(f"{base}+{tmp_path / 'a'}", "x"), torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    stock.load_state_dict(merged)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-4, rtol=0)


class TestRefused:
    def refuse(self, spec: str, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            Checkpoint.open(spec, "x")

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"peft_type": "IA3"}, "of the kind IA3; only LORA"),
            ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"r": 7}, "has rank 4, adapter_config.json says 7"),
        ],
    )
    def test_other_adapters(self, config: dict[str, Any], match: str, bases: dict[str, Path], tmp_path: Path) -> None:
        make_adapter(bases["mixtral"], tmp_path / "a", target_modules=["q_proj"])
        file = tmp_path / "a" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        self.refuse(f"{bases['mixtral']}+{tmp_path / 'a'}", f"^x: {bases['mixtral']}.*{match}")

    def test_an_adapter_of_another_model(self, bases: dict[str, Path], tmp_path: Path) -> None:
        make_adapter(bases["qwen3_moe"], tmp_path / "a", target_modules=["q_proj"])
        self.refuse(
            f"{bases['mixtral']}+{tmp_path / 'a'}", r"changes .*q_proj.weight of shape \[64, 32\], the base has"
        )

    def test_a_module_that_the_base_lacks(self, bases: dict[str, Path], tmp_path: Path) -> None:
        parts = {"lora_A.weight": torch.ones(4, 32), "lora_B.weight": torch.ones(9, 4)}
        tensors = {f"base_model.model.model.layers.0.self_attn.mystery.{k}": t for k, t in parts.items()}
        adapter = write_adapter(tmp_path / "a", tensors, {"peft_type": "LORA", "r": 4})
        self.refuse(f"{bases['mixtral']}+{adapter}", "mystery.weight, which the base does not have")

    def test_an_adapter_alone(self, bases: dict[str, Path], tmp_path: Path) -> None:
        make_adapter(bases["mixtral"], tmp_path / "a", target_modules=["q_proj"])
        self.refuse(str(tmp_path / "a"), r"NAME=BASE\+ADAPTER")

    def test_a_checkpoint_after_the_base(self, bases: dict[str, Path]) -> None:
        self.refuse(f"{bases['mixtral']}+{bases['mixtral_v5']}", "neither an adapter .* nor a patch")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"values": torch.ones(3, dtype=torch.bfloat16)}, "is BF16, the base's tensor F32"),
            ({"indices": torch.tensor([0, 1, 2048])}, r"places outside \[64, 32\]"),
            ({"indices": torch.tensor([0, 1, 1])}, "names a place twice"),
            ({"indices": torch.tensor([0.0, 1.0, 2.0])}, "must be int32 or int64"),
            ({"shape": torch.tensor([32, 64])}, r"of shape \[32, 64\], the base has \[64, 32\]"),
            ({"sha256": torch.zeros(32, dtype=torch.uint8)}, "changed in another base"),
            ({"scale": torch.ones(1)}, "belongs to no patch"),
        ],
    )
    def test_patches(self, change: dict[str, Tensor], match: str, bases: dict[str, Path], tmp_path: Path) -> None:
        parts = {"indices": torch.tensor([0, 1, 2]), "values": torch.ones(3), "shape": torch.tensor([64, 32])} | change
        save_file({f"{QUERY}.{leaf}": tensor for leaf, tensor in parts.items()}, tmp_path / "p.safetensors")
        with pytest.raises(CheckpointError, match=match):
            Checkpoint.open(f"{bases['qwen3_moe']}+{tmp_path / 'p.safetensors'}", "x").tensor(QUERY)
