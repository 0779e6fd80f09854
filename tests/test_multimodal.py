"""Text out of multimodal checkpoints: the language part is planned and served, towers are left out and named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AriaConfig, AriaForConditionalGeneration

from families import COMMON, randomize
from polymoe import LLM, SamplingParams
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
