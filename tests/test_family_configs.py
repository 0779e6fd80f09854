"""Two config.json are one family when the stock model computes the same with both, however they spell it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import make_family, make_switch_family
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.errors import CheckpointError, FamilyError
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.computation import Computation
from polymoe.offline.checkpoint.configs import max_model_len
from polymoe.offline.checkpoint.family import Family

TOKENS = torch.randint(0, 112, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Pairs, made when first asked for."""

    class Made(dict[str, dict[str, Path]]):
        def __missing__(self, arch: str) -> dict[str, Path]:
            overrides: dict[str, Any] = {"sliding_window": 8} if arch == "phimoe" else {}
            self[arch] = make_family(arch, tmp_path_factory.mktemp(arch), num_variants=2, **overrides)
            return self[arch]

    return Made()


def edited(paths: dict[str, Path], folder: Path, *edits: dict[str, Any]) -> dict[str, Path]:
    """Copies of a pair; the n-th edit changes the n-th config.json from the last: "-" removes a key."""
    copies = {name: Path(shutil.copytree(path, folder / name)) for name, path in paths.items()}
    for path, edit in zip(reversed(copies.values()), edits, strict=False):
        config = json.loads((path / "config.json").read_text()) | edit
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "-"}))
    return copies


@torch.no_grad()
def stock_logits(config_of: Path, weights_of: Path) -> torch.Tensor:
    """What transformers computes with the config of one folder and the weights of another."""
    config = AutoConfig.from_pretrained(config_of)
    model = AutoModelForCausalLM.from_pretrained(
        weights_of, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    logits: torch.Tensor = model.eval()(TOKENS, use_cache=False).logits
    return logits


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # (architecture, keys of v1's config.json, keys of base's)
    ("mixtral", {"head_dim": "-"}, {"head_dim": 8}),
    ("mixtral", {"head_dim": None}, {"head_dim": 8}),
    ("olmoe", {"head_dim": 8}, {}),
    ("granitemoe", {"head_dim": 8}, {}),
    ("phimoe", {"head_dim": 8}, {"head_dim": "-"}),
    ("qwen2_moe", {"max_window_layers": 28, "use_sliding_window": False}, {"max_window_layers": 48}),
    ("qwen3_moe", {"max_window_layers": 28, "use_sliding_window": False}, {"max_window_layers": 48}),
    ("qwen2_moe", {"sliding_window": 4}, {"sliding_window": None, "use_sliding_window": False}),
    ("qwen3_moe", {"sliding_window": 4}, {"sliding_window": None, "use_sliding_window": False}),
    ("qwen2_moe", {"layer_types": "-"}, {"layer_types": ["full_attention"] * 2}),
    ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [1]}, {"decoder_sparse_step": "-"}),
    ("mixtral", {"sliding_window": 256}, {"sliding_window": None}),  # as long as the context
    ("phimoe", {"sliding_window": 256}, {"sliding_window": 300}),
    ("mixtral", {"hidden_act": "swish"}, {"hidden_act": "silu"}),
    ("mixtral", {"num_local_experts": "-", "num_experts": 4}, {}),
    ("mixtral", {"rope_parameters": "-", "rope_theta": 1e6}, {"rope_parameters": ROPE | {"rope_theta": 1000000}}),
    (
        "mixtral",
        {"rope_parameters": "-", "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": LINEAR},
    ),
    (
        "glm4_moe",
        {"rope_parameters": "-", "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": LINEAR},
    ),
    ("mixtral", {"torch_dtype": "bfloat16", "dtype": "-", "transformers_version": "4.36.0"}, {"use_cache": False}),
    ("mixtral", {"architectures": None, "pad_token_id": 2}, {"pad_token_id": None}),
    ("mixtral", {"temperature": 0.3, "do_sample": True, "max_length": 4096, "top_k": 5}, {"repetition_penalty": 1.2}),
    ("mixtral", {"lora_alpha": 16, "quantization_config": None, "peft": {"r": [1, 2]}}, {}),
    ("gpt_oss", {"lora_alpha": 13}, {}),
    ("deepseek_v3", {"moe_layer_freq": 1, "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}, {}),
    ("deepseek_v3", {"head_dim": "-", "qk_head_dim": "-"}, {}),
    ("olmoe", {"clip_qkv": None}, {"clip_qkv": "-"}),
]


@pytest.mark.parametrize(("arch", "one", "other"), SAME)
def test_the_same_model_spelled_in_two_ways(
    arch: str, one: dict[str, Any], other: dict[str, Any], families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """`"head_dim": 8`, which is the computed value, in one config.json only was refused as another family; so were
    `max_window_layers` beside `use_sliding_window: false` and any key that a trainer had left."""
    paths = edited(families[arch], tmp_path, one, other)
    base, v1 = paths.values()
    assert torch.equal(stock_logits(v1, base), stock_logits(base, base))
    Family.open(paths)


DIFFERENT: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("mixtral", {"rms_norm_eps": 1e-2}, {}, "rms_norm_eps is 1e-05 in base and 0.01 in v1"),
    ("mixtral", {"hidden_act": "gelu"}, {}, "hidden_act is 'silu' in base and 'gelu' in v1"),
    ("mixtral", {"sliding_window": 16}, {}, "sliding_window is None in base and 16 in v1"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, {}, "layer_types"),
    ("qwen2_moe", {"use_sliding_window": True, "layer_types": "-", "sliding_window": 8}, {}, "layer_types"),
    ("qwen3_moe", {"norm_topk_prob": False}, {}, "norm_topk_prob is True in base and False in v1"),
    ("granitemoe", {"logits_scaling": 3.0, "lora_alpha": 4}, {}, "logits_scaling is 2.0 in base and 3.0 in v1"),
    ("deepseek_v3", {"rope_interleave": False}, {}, "rope_interleave is True in base and False in v1"),
    ("deepseek_v3", {"topk_group": 4, "n_group": 4}, {}, "topk_group is 2 in base and 4 in v1"),
    ("phimoe", {"sliding_window": 8}, {"sliding_window": 16}, "sliding_window is 16 in base and 8 in v1"),
    ("mixtral", {"rope_parameters": LINEAR}, {}, "rope_parameters is"),
    ("gpt_oss", {"rope_parameters": ROPE | {"rope_theta": 5000.0}}, {}, "rope_parameters is"),
    ("olmoe", {"clip_qkv": 0.5}, {}, "clip_qkv is None in base and 0.5 in v1"),
]


@pytest.mark.parametrize(("arch", "one", "other", "reason"), DIFFERENT)
def test_models_that_compute_differently(
    arch: str,
    one: dict[str, Any],
    other: dict[str, Any],
    reason: str,
    families: dict[str, dict[str, Path]],
    tmp_path: Path,
) -> None:
    """The refusal names the field that matters, both variants, both files and what to do."""
    paths = edited(families[arch], tmp_path, one, other)
    base, v1 = paths.values()
    assert not torch.equal(stock_logits(v1, base), stock_logits(base, base))
    with pytest.raises(FamilyError, match=reason) as raised:
        Family.open(paths)
    for part in (f"{base / 'config.json'}", f"{v1 / 'config.json'}", "write it into both"):
        assert part in str(raised.value)


def test_a_value_that_random_inputs_do_not_reach(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """Clipping at 1e6 leaves the logits of a tiny random model alone, but not those of every model: a comparison of
    logits alone would have taken the two for one."""
    paths = edited(families["olmoe"], tmp_path, {"clip_qkv": 1e6})
    base, v1 = paths.values()
    assert torch.equal(stock_logits(v1, base), stock_logits(base, base))
    with pytest.raises(FamilyError, match=r"clip_qkv is None in base and 1000000\.0 in v1"):
        Family.open(paths)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_unknown_keys_are_named(arch: str, families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """Only those: `head_dim` is no field of Qwen3-MoE's config class, but its model reads it."""
    paths = edited(families[arch], tmp_path, {"lora_alpha": 16, "unsloth_version": "2026.1", "my_trainer": {"a": 1}})
    kind = type(AutoConfig.from_pretrained(paths["v1"])).__name__
    notes = Family.open(paths).notes
    assert notes == [f"v1: config.json has keys that {kind} does not know: lora_alpha, my_trainer."]


@pytest.mark.parametrize(
    ("rope", "same"),
    [
        (ROPE, True),
        (LINEAR, True),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}, True),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 64}, False),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
    ],
)
def test_another_length_of_context(rope: dict[str, Any], same: bool, tmp_path: Path) -> None:
    """Scaled rotary tables may depend on the length they were made for; those that do not were refused as well."""
    paths = make_family("mixtral", tmp_path / "made", num_variants=2, rope_parameters=rope)
    paths = edited(paths, tmp_path, {"max_position_embeddings": 512})
    if same:
        base, v1 = paths.values()
        assert torch.equal(stock_logits(v1, base), stock_logits(base, base))
        assert [max_model_len(c.config) for c in Family.open(paths).checkpoints] == [256, 512]
    else:
        with pytest.raises(FamilyError, match="max_position_embeddings is 256 in base and 512 in v1"):
            Family.open(paths)


def test_looking_leaves_the_config_alone() -> None:
    """The fields that a forward pass reads are noted on the model's own copy of the config."""
    config = AutoConfig.for_model("mixtral", num_hidden_layers=1)
    before = type(config), config.to_dict()
    assert "sliding_window" in Computation.of(config).reads
    assert (type(config), config.to_dict()) == before


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_such_a_family_is_served_exactly(arch: str, families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """A trainer's key, another `use_cache` and a float16 `torch_dtype` beside float32 weights change no logit."""
    paths = edited(families[arch], tmp_path, {"lora_alpha": 16, "use_cache": False, "torch_dtype": "float16"})
    make_plan(paths, "separate", None, tmp_path / "bundle")
    engine = EngineCore(
        EngineConfig(bundle=str(tmp_path / "bundle"), device="cpu", dtype="float32", num_kv_blocks=40, num_threads=1)
    )
    window = TOKENS[0].tolist()
    for logits, path in zip(engine.prompt_logits([(0, window), (1, window)]), paths.values(), strict=True):
        assert torch.allclose(logits, stock_logits(path, path)[0], atol=1e-4)


def test_every_refusal_names_variant_and_path(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    paths = edited(families["mixtral"], tmp_path, {"model_type": "hyper_moe_9000"})
    with pytest.raises(CheckpointError, match=f"^v1: {paths['v1'] / 'config.json'}: transformers cannot read it"):
        Family.open(paths)
    paths = edited(families["mixtral"], tmp_path / "again", {"quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(CheckpointError, match=f"^v1: {paths['v1']}: .*quantised \\(hqq\\).*Give the original"):
        Family.open(paths)
    with pytest.raises(CheckpointError, match=r"^v1: nowhere is not a directory"):
        Family.open({"v1": "nowhere"})
    paths = edited(families["mixtral"], tmp_path / "third", {"pad_token_id": 4000})
    with pytest.raises(CheckpointError, match=f"^v1: {paths['v1']}: .*Padding_idx"):
        Family.open(paths)


def test_encoder_decoders_are_compared_as_well(tmp_path: Path) -> None:
    made = make_switch_family(tmp_path / "made", num_variants=2)
    family = Family.open(edited(made, tmp_path / "same", {"lora_alpha": 16}))
    assert family.notes == ["v1: config.json has keys that SwitchTransformersConfig does not know: lora_alpha."]
    for field, value in {
        "layer_norm_epsilon": 0.1,
        "dense_act_fn": "gelu",
        "n_positions": 99,
    }.items():
        with pytest.raises(FamilyError, match=f"{field} is .* in base and {value!r} in v1"):
            Family.open(edited(made, tmp_path / field, {field: value}))


def test_tokenizers_that_are_none(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """A tokenizer.json of another shape was a traceback."""
    for number, content in enumerate(
        ({"model": {"vocab": {"a": [1]}}}, {"model": {"vocab": [1]}}, {"added_tokens": [1]})
    ):
        paths = edited(families["mixtral"], tmp_path / str(number))
        (paths["v1"] / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match=f"^v1: {paths['v1'] / 'tokenizer.json'}: not a tokenizer's vocabulary"
        ):
            Family.open(paths)
