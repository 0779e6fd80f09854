"""Calibration: the streamed forward pass is the stock model's, fitted experts are nearer, and bad text is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoded import flat, served_experts
from families import make_family
from polymoe.errors import CheckpointError, PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.calibrate.family_run import FamilyRun
from polymoe.offline.calibrate.token_rows import TokenRows
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.encode.encode import make_encoder
from polymoe.offline.encode.position_codec import PackedTensor, encode_tensor
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import scan_family

TEXT = "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5\n" * 60


def windows(num_variants: int, count: int = 12, length: int = 32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randint(2, 110, (count, length), generator=generator) for _ in range(num_variants))


def rows_of(texts: tuple[torch.Tensor, ...]) -> list[TokenRows]:
    return [TokenRows(text) for text in texts]


def one_group(family: Family, base: str, delta: str, merge: str = "regmean") -> Plan:
    info = family.architecture
    shape = (len(family.names), info.num_layers, info.num_experts)
    base_, merge_, delta_ = (np.array(text, dtype=object) for text in (base, merge, delta))
    return Plan("test", np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.bool_), "", base_, merge_, delta_)


@pytest.mark.parametrize(
    "arch",
    [
        *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "qwen3_5_moe_text", "nemotron_h", "lfm2_moe"),
        *("minimax", "deepseek_v32"),
    ],
)
def test_the_streamed_pass_is_the_stock_models(arch: str, tmp_path: Path) -> None:
    paths = make_family(arch, tmp_path, 2)
    family, texts = Family.open(paths), windows(2, 3)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths.values()]
    kept = [[0, 2], [1]]
    with torch.no_grad(), FamilyRun(family, rows_of(texts), kept, 2) as run:
        for path in family.architecture.expert_modules:
            run.proceed(
                [
                    model.get_submodule(path)(found.hidden, found.index, found.gate)
                    for model, found in zip(models, run.arrive(), strict=True)
                ]
            )
        for model, text, rows, logits in zip(models, texts, kept, run.logits(), strict=True):
            want = model(input_ids=text).logits[rows][:, ::2].flatten(0, 1)
            assert torch.allclose(logits, want, atol=1e-5)


def test_weights_leave_with_the_layer(tmp_path: Path) -> None:
    """Memory stays near one layer: while layer 1 waits, layer 0 and the embeddings are gone, and in the end all are."""
    family = Family.open(make_family("mixtral", tmp_path, 1))
    with torch.no_grad(), FamilyRun(family, rows_of(windows(1, 2))) as run:
        present = []
        for _ in range(2):
            (found,) = run.arrive()
            model = run.model(0)
            present.append({name for name, p in model.named_parameters() if not p.is_meta})
            run.proceed([torch.zeros_like(found.hidden)])
        run.logits()
        assert all(p.is_meta for p in model.parameters())
    assert all(name.startswith("model.layers.0.") for name in present[0])
    assert all(name.startswith("model.layers.1.") for name in present[1])
    assert present[0]
    assert present[1]


def routed_error(family: Family, plan: Plan, texts: tuple[torch.Tensor, ...], calibration: Calibration | None) -> float:
    """Relative error of the layers' outputs on `texts` when every variant is served by what the encoder made."""
    served = served_experts(family, plan, calibration)
    info, error, energy = family.architecture, 0.0, 0.0
    models = [AutoModelForCausalLM.from_pretrained(c.path, dtype=torch.float32).eval() for c in family.checkpoints]
    with torch.no_grad(), FamilyRun(family, rows_of(texts)) as run:
        for layer, path in enumerate(info.expert_modules):
            outputs = []
            for v, found in enumerate(run.arrive()):
                module = models[v].get_submodule(path)
                outputs.append(module(found.hidden, found.index, found.gate))
                for tensor in info.expert_shapes:
                    getattr(module, tensor).data.copy_(served[v, layer][tensor])
                wrong = module(found.hidden, found.index, found.gate)
                error += float((wrong - outputs[-1]).square().sum())
                energy += float(outputs[-1].square().sum())
            run.proceed(outputs)
    return error / energy


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("base", "delta"), [("int4", "d1"), ("int4", "d2"), ("int3", "none"), ("stored", "±d4")])
def test_calibrated_experts_are_nearer_on_unseen_text(arch: str, base: str, delta: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the fine-tunes
    family = Family.open(make_family(arch, tmp_path, 2, perturb=0.3))
    texts = windows(2, 60)
    seen, unseen = tuple(t[:48] for t in texts), tuple(t[48:] for t in texts)
    plain = routed_error(family, one_group(family, base, delta, "mean"), unseen, None)
    fitted = routed_error(family, one_group(family, base, delta), unseen, Calibration(seen))
    assert fitted < plain


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family.open(make_family("mixtral", tmp_path / "family", 2))
    scan, plan = scan_family(family), one_group(family, "int4", "d2")
    straight = make_encoder(family, scan, plan, Calibration(windows(2)))
    want = [flat(straight.layer(layer)) for layer in range(2)]

    calibration = Calibration(windows(2), tmp_path / "kept")
    make_encoder(family, scan, plan, calibration).layer(0)  # and then the process is killed
    encoded = []

    def counting(*args: Any) -> PackedTensor:
        encoded.append(args[0])
        return encode_tensor(*args)

    monkeypatch.setattr("polymoe.offline.encode.calibrated_encoder.encode_tensor", counting)
    again = make_encoder(family, scan, plan, calibration)
    found = [flat(again.layer(layer)) for layer in range(2)]
    assert len(encoded) == 2 * 4  # two tensors of four experts: layer 1 only
    for one, other in zip(want, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.open(make_family("mixtral", tmp_path_factory.mktemp("family"), 2, tokenizer=True))


def test_text_becomes_even_windows(tokenized: Family, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    made = Calibration.from_files(tokenized, {"base": [tmp_path / "a.txt"]}, window=32, max_windows=5)
    assert [tuple(w.shape) for w in made.windows] == [(5, 32), (5, 32)]  # v1 reads base's text
    assert made.hash() != Calibration(tuple(w + 1 for w in made.windows)).hash()


def test_conversations_go_through_the_chat_template(tokenized: Family, tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]})
    (tmp_path / "chat.jsonl").write_text((line + "\n") * 40)
    made = Calibration.from_files(tokenized, {"v1": [tmp_path / "chat.jsonl"]}, window=64)
    text = AutoTokenizer.from_pretrained(tokenized.checkpoints[1].path).decode(made.windows[1][0])
    assert "v1user: the quick" in text  # the variant's own template


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"v7": ["a.txt"]}, "no variant 'v7'; there are base, v1"),
        ({"base": ["short.txt"]}, "has [0-9]+ tokens; at least 256 are needed"),
        ({"base": ["missing.txt"]}, "missing.txt: No such file"),
        ({"base": ["bad.jsonl"]}, "bad.jsonl, line 1 has neither text nor messages"),
        ({}, "needs text"),
    ],
)
def test_unusable_text_is_refused(tokenized: Family, tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("the quick brown fox jumps")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(PlanError, match=reason):
        Calibration.from_files(tokenized, {name: [tmp_path / f for f in given] for name, given in files.items()})


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path, 2)
    file = paths["v1"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)  # finite, but not what comes of it
    save_file(tensors, file, {"format": "pt"})
    family = Family.open(paths)
    encoder = make_encoder(family, scan_family(family), one_group(family, "int4", "d1"), Calibration(windows(2)))
    encoder.layer(0)
    with pytest.raises(CheckpointError, match=r"v1: the input of expert layer 1 .* has NaN or infinite"):
        encoder.layer(1)
