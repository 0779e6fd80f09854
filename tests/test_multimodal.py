"""Text out of multimodal checkpoints: the language part is planned and served, towers are left out and named."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AriaConfig, AriaForConditionalGeneration, AutoConfig, AutoModelForMultimodalLM

from families import ARCHITECTURES, COMMON, randomize
from polymoe import LLM, SamplingParams
from polymoe.console import Console
from polymoe.errors import CheckpointError
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.checkpoint import Checkpoint

TEXT = COMMON | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "pad_token_id": 0}
VISION = {
    "model_type": "idefics3_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SMALL_TOWER = {
    **{"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
}
_DEEP_TOWER = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "image_size": 28},
}
_QWEN3 = COMMON | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Architecture -> (its config beside the text's, the text's, what the names of towers begin with).
# The language parts of the first two are text models of transformers; of the others it has none.
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "gemma4": (
        {"vision_config": _SMALL_TOWER, "audio_config": None},
        COMMON
        | {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "global_head_dim": 24}
        | {"vocab_size_per_layer_input": 112, "hidden_size_per_layer_input": 8, "sliding_window": 8}
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
        | {"pad_token_id": 0, "num_kv_shared_layers": 0},
        ("model.vision_tower.", "model.embed_vision."),
    ),
    "kimi_k25": (
        {"vision_config": _SMALL_TOWER, "projection_hidden_size": 32},
        {"model_type": "deepseek_v3", **COMMON, **ARCHITECTURES["deepseek_v3"]},
        ("vision_tower.", "mm_projector.", "model.mm_projector."),
    ),
    "qwen3_vl_moe": ({"vision_config": _DEEP_TOWER}, _QWEN3, ("model.visual.",)),
    "glm4v_moe": (
        {"vision_config": _DEEP_TOWER},
        COMMON
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"rope_parameters": _DEFAULT_ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
        ("model.visual.",),
    ),
    "ernie4_5_vl_moe": (
        {"vision_config": _DEEP_TOWER},
        COMMON
        | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 8], "moe_num_shared_experts": 1}
        | {"mlp_layer_types": ["dense", "sparse"], "tie_word_embeddings": True}
        | {"rope_parameters": _DEFAULT_ROPE | {"mrope_section": [1, 1, 2]}},
        ("vision_model.", "model.resampler_model.", "model.vision_model.", "model.layers.1.mlp.gate.weight_1"),
    ),
    "qwen3_omni_moe_thinker": (
        {"vision_config": _DEEP_TOWER, "vision_start_token_id": 109, "audio_start_token_id": 108}
        | {
            "audio_config": {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 32}
            | {"num_mel_bins": 16, "downsample_hidden_size": 8, "output_dim": 32}
        },
        _QWEN3,
        ("thinker.visual.", "thinker.audio_tower.", "talker."),
    ),
}


def as_kimi_names_layers(folder: Path) -> None:
    """transformers 5.23 calls the layers of the text `blocks` when it saves, as only the tower's are."""
    stored = load_file(folder / "model.safetensors")
    named = {re.sub(r"^(language_model\.model)\.blocks\.", r"\1.layers.", name): stored[name] for name in stored}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def in_an_omni_model(folder: Path) -> None:
    """A thinker as Qwen3-Omni stores it: beside a talker, below the config and the names of the whole."""
    stored = load_file(folder / "model.safetensors")
    stored = {f"thinker.{name.removeprefix('thinker.')}": tensor for name, tensor in stored.items()}
    save_file(stored | {"talker.codec_head.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": json.loads((folder / "config.json").read_text()),
        "talker_config": {},
        "code2wav_config": {},
    }
    (folder / "config.json").write_text(json.dumps(config))


_RENAMED = {"kimi_k25": as_kimi_names_layers, "qwen3_omni_moe_thinker": in_an_omni_model}


@pytest.mark.parametrize("name", WHOLE)
def test_language_parts_are_served_as_the_whole_models_answer(name: str, tmp_path: Path) -> None:
    """Two unrelated variants in one batch, in chunks, with one slot; all names are the published ones."""
    own, text, towers = WHOLE[name]
    models, paths = {}, {}
    for seed, variant in enumerate(("base", "tuned")):
        config = AutoConfig.for_model(name, **{"tie_word_embeddings": False, **own, "text_config": text})
        models[variant] = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
        randomize(models[variant], seed)
        paths[variant] = tmp_path / variant
        models[variant].save_pretrained(paths[variant])
        _RENAMED.get(name, lambda _: None)(paths[variant])
    checkpoint = Checkpoint.open(paths["base"], "base")
    stored = load_file(paths["base"] / "model.safetensors")
    assert set(checkpoint.ignored) == {tensor for tensor in stored if tensor.startswith(towers)}
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    bundle = make_plan(paths, "separate", None, tmp_path / "b", console=console).path
    assert "towers and projectors for images and sound" in printed.getvalue()
    prompts = [[5, 9, 33, 70, 12, 8, 2, 44, 17, 30, 21], [7, 2, 9]]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    llm = LLM(bundle, dtype="float32", device="cpu", slots=1, max_num_batched_tokens=5, kv_cache_bytes=1 << 22)
    asked = [(prompt, variant) for prompt in prompts for variant in models]
    outputs = llm.generate([prompt for prompt, _ in asked], params, variants=[variant for _, variant in asked])
    for (prompt, variant), output in zip(asked, outputs, strict=True):
        ids = torch.tensor([prompt])
        completion = output.outputs[0]
        assert completion.logprobs is not None
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            with torch.no_grad():
                scores = models[variant](input_ids=ids).logits[0, -1].log_softmax(-1)
            assert token == int(scores.argmax())
            assert entry[token].logprob == pytest.approx(float(scores[token]), abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Variant -> (checkpoint of an AriaForConditionalGeneration, the whole model)."""
    found = {}
    for seed, name in enumerate(("base", "tuned")):
        config = AriaConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
        model = AriaForConditionalGeneration(config).eval()
        randomize(model, seed)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = folder, model
    return found


def test_towers_are_named(made: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = made["base"]
    checkpoint = Checkpoint.open(folder, "base")
    stored = load_file(folder / "model.safetensors")
    towers = {name for name in stored if "vision_tower" in name or "projector" in name}
    assert towers
    assert set(checkpoint.ignored) == towers
    (note,) = checkpoint.notes
    assert f"(towers and projectors for images and sound; {len(towers)} in all, " in note


def test_served_as_the_whole_model_answers_to_text(made: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    bundle = make_plan({name: folder for name, (folder, _) in made.items()}, "separate", None, tmp_path / "b").path
    llm = LLM(bundle, dtype="float32", device="cpu")
    prompts = [[5, 9, 33, 70, 12], [7, 2, 9]]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for prompt in prompts:
        for output, (_, model) in zip(
            llm.generate([prompt] * 2, params, variants=list(made)), made.values(), strict=True
        ):
            ids = torch.tensor([prompt])
            for _step in range(10):  # without `generate`, whose defaults come from the text config
                with torch.no_grad():
                    ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            assert output.outputs[0].token_ids == ids[0, len(prompt) :].tolist()


def test_other_tensors_are_refused(made: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = made["base"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors") | {"model.mystery.weight": torch.ones(2)}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no place for model\.mystery\.weight"):
        Checkpoint.open(tmp_path, "x")
