"""Switch Transformers from checkpoints to bundles and figures: names, plans, refusals, pairs.

That they are served right is in test_switch.py and test_exactness.py.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from decoded import decoded_experts
from families import make_family, make_switch_family, write_pairs
from polymoe.bundle.reader import Bundle
from polymoe.cli.main import app
from polymoe.console import Console
from polymoe.errors import CheckpointError, FamilyError, PolymoeError
from polymoe.evaluate.fidelity import OriginalModel
from polymoe.evaluate.texts import encode_texts
from polymoe.model.stock.switch_experts import stacked_name
from polymoe.offline.api import inspect, make_plan
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.plan.options import POLICIES, PlanOptions
from polymoe.offline.similarity.scan import scan_family
from polymoe.offline.write.bundle_writer import write_bundle
from polymoe.text.tokenizer import VariantTokenizer

EXPERTS = ("encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts")
POLICY_OPTIONS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("separate", None, {}), ("separate", "1.5x", {}), ("separate", None, {"base": "int8"}), ("paper", None, {}),
    ("mean", None, {}), ("cluster", None, {}), ("exact-delta", None, {}), ("auto", None, {}), ("auto", "1.5x", {}),
    ("auto", None, {"min_top1": 0.9}),
    *(("delta", None, {"delta_bits": bits, "base": base})
      for bits, base in ((1, "stored"), (2, "int4"), (3, "int8"), (4, "int4"))),
]  # fmt: skip


def stock(path: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Expert 2 is identical in all variants; of the others a fifth of the values are changed."""
    folder = tmp_path_factory.mktemp("switch")
    return make_switch_family(folder, frozen=r"\.q\.weight", frozen_experts=[2], changed=0.2, n_positions=48)


@pytest.fixture(scope="module")
def bundle(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_plan(paths, "separate", None, tmp_path_factory.mktemp("bundle") / "separate")


@pytest.fixture(scope="module")
def texts(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pairs(paths, tmp_path_factory.mktemp("texts"), count=30, most_words=8, between="\n\n")


def evaluate(bundle: Path, texts: dict[str, Path], *options: str) -> dict[str, Any]:
    given = [part for name, path in texts.items() for part in ("--text", f"{name}={path}")]
    result = CliRunner().invoke(app, ["eval", str(bundle), *given, "--device", "cpu", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return report


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"num_experts": 12, "router_bias": True}])
def test_experts_are_stacked_in_the_order_of_their_numbers(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = make_switch_family(tmp_path, num_variants=1, **overrides)["base"]
    checkpoint = Checkpoint.open(path, "x")
    info = checkpoint.architecture
    assert info.class_name == "SwitchTransformersForConditionalGeneration"
    assert info.expert_modules == EXPERTS
    assert info.expert_shapes == {"up_proj": (64, 32), "down_proj": (32, 64)}
    seen = set(checkpoint.tied)
    for name, tensor in stock(path).state_dict().items():
        if name in checkpoint.tied:
            continue
        target, row = stacked_name(name) or (name, slice(None))
        assert torch.equal(checkpoint.tensor(target)[row], tensor), name
        seen.add(target)
    assert seen == {*checkpoint.target_names, *checkpoint.tied}
    assert {f"{path}.{tensor}" for path in EXPERTS for tensor in info.expert_shapes} | set(info.nonexperts) == set(
        checkpoint.target_names
    )
    embeddings = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert checkpoint.tied == (dict.fromkeys(embeddings, "shared.weight") if len(overrides) != 1 else {})
    assert set(info.vocab_tensors) == {"shared.weight", *embeddings} - set(checkpoint.tied)


def test_stored_otherwise(tmp_path: Path) -> None:
    """All ends of a tie, as trainers before transformers 5 stored them, and stacks, as a bundle's names are."""
    path = make_switch_family(tmp_path, num_variants=1)["base"]
    original = Checkpoint.open(path, "x")
    wanted = {name: original.tensor(name) for name in original.target_names}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors["shared.weight"].clone()
        for e in range(4):
            del tensors[f"{EXPERTS[0]}.expert_{e}.wi.weight"]
        tensors[f"{EXPERTS[0]}.up_proj"] = wanted[f"{EXPERTS[0]}.up_proj"]

    edit_tensors(path, change)
    checkpoint = Checkpoint.open(path, "x")
    assert set(checkpoint.target_names) == set(wanted)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in wanted.items())
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["shared.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight to shared.weight, but .* different values"):
        Checkpoint.open(path, "x")


@pytest.mark.parametrize(
    ("expert", "message"), [(1, "numbered 0, 2, 3; experts are missing in between"), (3, r"shape \[3, 64, 32\]")]
)
def test_a_missing_expert_is_refused(tmp_path: Path, expert: int, message: str) -> None:
    path = make_switch_family(tmp_path, num_variants=1)["base"]
    edit_tensors(path, lambda t: t.pop(f"{EXPERTS[1]}.expert_{expert}.wi.weight"))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path, "x")


def test_inspect_tells_encoder_layers_from_decoder_layers(paths: dict[str, Path], tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    scan = inspect(paths, tmp_path / "map.png", console)
    assert scan.layer_names == ["encoder 1", "decoder 1"]
    assert (scan.expert_same_as[:, :, 2] == 0).all()
    assert (scan.expert_same_as[:, :, 0] == torch.arange(3)[:, None].numpy()).all()
    shown = console.export_text()
    assert "encoder 1" in shown
    assert "decoder 1" in shown
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_policy_makes_a_bundle(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = make_switch_family(tmp_path / "family", changed=0.2, dtype=dtype)
    family = Family.open(paths)
    scan = scan_family(family)
    assert {policy for policy, _, _ in POLICY_OPTIONS} == set(POLICIES) - {"regmean"}  # which needs text
    for number, (policy, memory, options) in enumerate(POLICY_OPTIONS):
        plan = build_plan(scan, policy, memory, PlanOptions(**options), family)
        bundle = Bundle.open(write_bundle(family, scan, plan, tmp_path / str(number)).path, verify=True)
        assert (bundle.manifest.policy, tuple(bundle.expert_modules)) == (policy, EXPERTS)
        assert bundle.table.shape == (3, 2, 4)
        assert bundle.config.is_encoder_decoder
        lossless, worst = policy in ("separate", "exact-delta") and not options, 0.0
        for v, checkpoint in enumerate(family.checkpoints):
            for layer, path in enumerate(EXPERTS):
                for name, served in decoded_experts(bundle, v, layer).items():
                    own = checkpoint.tensor(f"{path}.{name}").float()
                    worst = max(worst, float((served - own).norm() / own.norm()))
            for name in bundle.nonexpert_names:
                assert torch.equal(bundle.nonexpert(v, name), checkpoint.tensor(name))
        assert worst < 0.25, (policy, options)
        if policy != "auto":  # which may find room for everything
            assert (worst == 0.0) is lossless, (policy, options)


def test_what_the_manifest_tells(bundle: Bundle) -> None:
    assert [variant.max_model_len for variant in bundle.variants] == [96] * 3  # encoder and decoder have half each
    assert bundle.manifest.tied["lm_head.weight"] == "shared.weight"
    assert (bundle.table[:, :, 2] == bundle.table[:1, :, 2]).all(), "identical experts are stored once"
    assert set(bundle.nonexpert_sources("encoder.block.0.layer.0.SelfAttention.q.weight")) == {0}
    assert bundle.resident_bytes.resident_experts == (3 * 3 + 1) * 2 * 2 * 64 * 32 * 4


def test_families_that_do_not_belong_together(paths: dict[str, Path], tmp_path: Path) -> None:
    mixtral = make_family("mixtral", tmp_path / "mixtral", num_variants=1)["base"]
    other = make_switch_family(tmp_path / "more", num_variants=1, num_experts=8, n_positions=48)["base"]
    with pytest.raises(FamilyError, match="model_type is 'switch_transformers' in base and 'mixtral' in x"):
        Family.open({"base": paths["base"], "x": mixtral})
    with pytest.raises(FamilyError, match="num_experts is 4 in base and 8 in x"):
        Family.open({"base": paths["base"], "x": other})


@torch.no_grad()
def test_figures_are_those_of_the_stock_loss(paths: dict[str, Path], texts: dict[str, Path], bundle: Bundle) -> None:
    figures = evaluate(bundle.path, texts)["variants"]
    for name, path in paths.items():
        model, tokenizer = stock(path), VariantTokenizer(path)
        nll, tokens = 0.0, 0
        for line in filter(None, texts[name].read_text().split("\n")):
            pair = json.loads(line)
            source, target = (torch.tensor([tokenizer.encode(pair[key])]) for key in ("input", "target"))
            assert target[0, -1] == 1, "the end of the text is predicted too"
            nll += float(model(input_ids=source, labels=target).loss) * target.shape[1]
            tokens += target.shape[1]
        assert figures[name]["tokens"] == tokens
        assert figures[name]["ppl_original"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert figures[name]["ppl_served"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert figures[name]["kl"] < 1e-7
        assert figures[name]["top1_agreement"] > 0.99


@torch.no_grad()
def test_an_experts_capacity_is_that_of_generate(texts: dict[str, Path], tmp_path: Path) -> None:
    """A forward pass over a whole target counts all its tokens against the capacity; `generate` feeds one at a time, so
    that a decoder's experts never overflow. An encoder's do."""
    path = make_switch_family(tmp_path / "family", num_variants=1, expert_capacity=2)["base"]
    model, window = stock(path), [0, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]
    source, cache, steps = torch.tensor([[50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 1]]), None, []
    encoded = model.get_encoder()(source)
    for token in window:
        ids = torch.tensor([[token]])
        out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        steps.append(out.logits[0, -1])
        cache = out.past_key_values
    original = OriginalModel(path, torch.float32, torch.device("cpu"))
    found = original.logits([window, window[:3]], [source[0].tolist(), [50, 1]])
    assert torch.allclose(found[0], torch.stack(steps), atol=1e-4)
    whole = model(input_ids=source, decoder_input_ids=torch.tensor([window])).logits[0]
    assert not torch.allclose(found[0], whole, atol=1e-2), "the target is long enough to overflow"
    alone = make_plan({"base": path}, "separate", None, tmp_path / "bundle").path
    figures = evaluate(alone, {"base": texts["base"]}, "--limit", "8", "--batch", "3")
    assert figures["variants"]["base"]["kl"] < 1e-7


def test_a_plan_ends_with_its_figures(paths: dict[str, Path], texts: dict[str, Path], tmp_path: Path) -> None:
    specs = [f"{name}={path}" for name, path in paths.items()]
    out = tmp_path / "bundle"
    given = ["--text", f"v1={texts['v1']}"]
    result = CliRunner().invoke(
        app, ["plan", *specs, "--out", str(out), "--policy", "paper", *given], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    recorded = {variant.name: variant.fidelity for variant in Bundle.open(out).variants}
    assert recorded["base"] is None
    assert recorded["v1"] is not None
    figures = evaluate(out, {"v1": texts["v1"]})["variants"]["v1"]
    assert recorded["v1"].kl == pytest.approx(figures["kl"], rel=1e-3)
    assert recorded["v1"].tokens == figures["tokens"]
    assert recorded["v1"].kl > 1e-5


GOOD = '{"input": "the", "target": "fox"}'


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("the quick brown fox\n", [], r'--text v1: .*pairs.jsonl, line 1 is not JSON .*write \{"input": "…", "target"'),
        (f"{GOOD}\n\n[1]", [], "pairs.jsonl, line 3 is not an object"),
        (f'{GOOD}\n{{"input": "the"}}', [], "pairs.jsonl, line 2 has no text 'target'"),
        (f'{GOOD}\n{{"input": " ", "target": "fox"}}', [], "line 2 has no text 'input'"),
        ("\n\n", [], "pairs.jsonl has no pairs"),
        (json.dumps({"input": "0 1 2 3 4 " * 20, "target": "fox"}), [], "the input '0 1 2.* takes 48 at most"),
        (json.dumps({"input": "fox", "target": "0 1 2 3 4 " * 20}), [], "the target '0 1 2.* takes 48 at most"),
        (GOOD, ["--window", "64"], "--window cuts plain text; pairs .* are taken whole"),
    ],
)
def test_pairs_that_are_refused(bundle: Bundle, tmp_path: Path, content: str, options: list[str], message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(PolymoeError, match=message):
        evaluate(bundle.path, {"v1": tmp_path / "pairs.jsonl"}, *options)


def test_plain_text_says_nothing_of_an_encoder_decoder(paths: dict[str, Path], tmp_path: Path) -> None:
    """Other measurements than `eval` read plain text."""
    with pytest.raises(PolymoeError, match="--text base: plain text measures decoder-only models"):
        encode_texts(paths, {"base": tmp_path / "any.txt"})


def test_too_few_pairs_say_nothing(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(GOOD)
    arguments = ["plan", f"base={paths['base']}", "--out", str(tmp_path / "x"), "--text"]
    with pytest.raises(PolymoeError, match=r"targets of .*pairs.jsonl have \d tokens; at least 256"):
        CliRunner().invoke(app, [*arguments, f"base={tmp_path / 'pairs.jsonl'}"], catch_exceptions=False)
    assert not (tmp_path / "x").exists()
