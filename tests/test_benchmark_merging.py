"""`benchmarks.merging` on tiny random families: what is asked, who answers, and what the table says of it."""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from typer.testing import CliRunner, Result

from benchmarks.baselines.evaluation import Evaluation, TextEvaluation
from benchmarks.merging.__main__ import app
from benchmarks.merging.rouge import Mean, kept_share, require_rouge, rouge
from benchmarks.merging.run import choices
from benchmarks.merging.task import TaskEvaluation, draw_pairs, greedy_answers
from families import TEXT, make_family, make_tokenizer
from polymoe.bundle.reader import Bundle
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import OriginalModel
from polymoe.evaluate.record import float32_options
from polymoe.llm.llm import LLM
from polymoe.offline.api import make_plan
from polymoe.offline.calibrate.pairs import Pair
from polymoe.offline.checkpoint.family import Family
from polymoe.text.tokenizer import VariantTokenizer


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def specs(checkpoints: dict[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in checkpoints.items()]


def last_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide enough for groups of 64, close enough for deltas to be small."""
    folder = tmp_path_factory.mktemp("decoders")
    return make_family(
        "mixtral", folder, perturb=0.1, dtype=torch.bfloat16, tokenizer=True, hidden_size=64, intermediate_size=64
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("\n".join(TEXT * 12))
    return path


# --- pairs and scores


def write_pairs(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_pairs_are_drawn_by_seed_and_kept_in_order(tmp_path: Path) -> None:
    lines = [json.dumps({"input": f"question {i}", "target": f"{i}"}) for i in range(50)]
    path = write_pairs(tmp_path / "task.jsonl", [*lines[:30], "", *lines[30:]])
    assert draw_pairs("v1", path, 1000, seed=0) == [Pair(f"question {i}", f"{i}") for i in range(50)]
    drawn = [int(pair.target) for pair in draw_pairs("v1", path, 20, seed=0)]
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn)
    assert drawn != [int(pair.target) for pair in draw_pairs("v1", path, 20, seed=1)]
    assert drawn == [int(pair.target) for pair in draw_pairs("v1", path, 20, seed=0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a"', r"task.jsonl, line 3 is not JSON"),
        ('["a", "b"]', r"task.jsonl, line 3 is not an object"),
        ('{"input": "a", "output": "b"}', r"line 3 has no text 'target'"),
        ('{"input": "a", "target": 4}', r"line 3 has no text 'target'"),
        ('{"input": " ", "target": "b"}', r"line 3 has no text 'input'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"input": "a", "target": "b"})
    with pytest.raises(PolymoeError, match=message):
        draw_pairs("v1", write_pairs(tmp_path / "task.jsonl", [good, "", line, good]), 10, seed=0)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "task.jsonl", [json.dumps({"input": "a", "target": "b"})] * 19)
    with pytest.raises(PolymoeError, match="has 19 pairs; at least 20"):
        draw_pairs("v1", path, 200, seed=0)


def test_rouge_is_the_f_measure_of_words() -> None:
    found = rouge(["The cat sat", "", "one two"], ["the cat ran away", "something", "one two"])
    assert found["rouge1"] == pytest.approx([2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), 0, 1])
    assert found["rouge2"] == pytest.approx([2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3), 0, 1])


def test_the_share_kept_counts_paired_samples() -> None:
    alone = [0.2, 0.4, 0.9, 0.5]
    assert kept_share(alone, alone) == Mean(1.0, 0.0)
    half = kept_share([value / 2 for value in alone], alone)
    assert half is not None
    assert half.mean == pytest.approx(0.5)
    assert half.error == pytest.approx(0, abs=1e-12), "every sample lost the same share: nothing is uncertain"
    worse = kept_share([0.2, 0.4, 0.9, 0.3], alone)
    assert worse is not None
    assert worse.mean == pytest.approx(0.9)
    assert 0 < worse.error < 0.2
    assert kept_share([0.1, 0.2], [0.0, 0.0]) is None


def test_rouge_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(PolymoeError, match=r"pip install 'polymoe\[bench\]'"):
        require_rouge()


def test_rows_for_any_number_of_variants() -> None:
    for count in (2, 4, 6):
        groups = [choice[0].group for choice in choices(count, with_text=False)]
        assert groups == ["average", "merge", "paper", "paper", "copies", "delta", "auto"]
        fitted = choices(count, with_text=True)[7:]
        assert [choice[0].group for choice in fitted] == ["merge", "delta", "auto"]
        assert all(method.on_text for choice in fitted for method in choice)


# --- decoder-only families


def nothing(_: int) -> None:
    pass


def served_by(bundle: Bundle, evaluation: Evaluation) -> LLM:
    return LLM(bundle.path, **float32_options(evaluation.longest, evaluation.batch))


def test_the_variant_itself_is_perfect(decoders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Its own weights and a lossless bundle say what it says; another variant's weights do not."""
    family = Family.open(decoders)
    evaluation = TextEvaluation(family, "v1", text, samples=2, folder=tmp_path)
    alone = evaluation.alone(nothing)
    assert alone.fidelity.kl == 0
    own, other = family.checkpoints[1], family.checkpoints[2]
    unchanged: Iterator[tuple[str, torch.Tensor]] = iter([])
    for weights in (unchanged, ((n, own.tensor(n)) for n in own.target_names)):
        same = evaluation.of_weights(weights, nothing).fidelity
        assert same.kl < 1e-6
        assert same.perplexity_served == pytest.approx(alone.fidelity.perplexity_served)
    swapped = evaluation.of_weights(((n, other.tensor(n)) for n in other.target_names), nothing)
    assert swapped.fidelity.kl > 0.01
    assert swapped.fidelity.perplexity_original == alone.fidelity.perplexity_original
    assert swapped.fidelity.perplexity_served != alone.fidelity.perplexity_served
    bundle = make_plan(decoders, "separate", None, tmp_path / "bundle")
    served = evaluation.of_engine(served_by(bundle, evaluation), nothing).fidelity
    assert served.kl < 1e-6
    assert served.top1 == 1
    assert served.perplexity_served == pytest.approx(alone.fidelity.perplexity_served, rel=1e-5)


def test_the_whole_table_of_a_decoder_only_family(decoders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    result = invoke(
        *specs(decoders), "--text", f"v1={text}", "--samples", "1", "--out", str(tmp_path),
    )  # fmt: skip
    found = last_line(result)
    rows = found["rows"]
    assert [row["count"] for row in rows] == [1, *[2] * 7, *[3] * 7]
    assert {row["asked"] for row in rows} == {"v1"}
    assert found["skipped"] == {}
    alone, *others = rows
    assert alone["kl"] == 0
    for row in others:
        assert row["kl"] > 0
        assert row["rouge1"] is None
        assert row["expert_multiple"] <= (1.1 if row["group"] == "copies" else 1.0)
    by_name = {(row["count"], row["group"], row["name"]): row for row in others}
    for count in (2, 3):
        auto = by_name[count, "auto", "auto 1.0x"]
        assert auto["kl"] < by_name[count, "paper", "paper"]["kl"] / 10
        # The asked variant joins last: without reconfiguration it runs with the non-experts of another.
        assert (
            by_name[count, "paper", "paper, one variant's non-experts"]["kl"] > by_name[count, "paper", "paper"]["kl"]
        )
    widths = [row["name"] for row in others if row["group"] in ("delta", "copies")]
    assert widths == ["int8 copies", "int4 + 4 bit", "int4 copies", "int4 + 3 bit"] or len(widths) == 4, widths
    assert json.loads((tmp_path / "merging.json").read_text()) == found
    markdown = (tmp_path / "merging.md").read_text()
    assert "v1 (held-out.txt), 3 variants" in markdown
    assert "perplexity" in markdown
    assert (tmp_path / "merging.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_names_the_fix(decoders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    task = write_pairs(tmp_path / "task.jsonl", [json.dumps({"input": "a", "target": "b"})] * 20)
    arguments = ("--out", str(tmp_path))
    for options, message in [
        ([*specs(decoders)], "--text NAME=FILE"),
        ([*specs(decoders), "--text", f"poet={text}"], "poet"),
        ([*specs(decoders), "--text", f"v1={text}", "--variant", "poet"], "poet"),
        ([*specs(decoders), "--text", f"v1={text}", "--variant", "v2"], "v2 has nothing to be asked; give --text v2="),
        ([*specs(decoders), "--task", f"v1={task}"], "decoder-only family.*--text NAME=FILE"),
        ([*specs(decoders)[:1], "--text", f"base={text}"], "two or more"),
    ]:
        with pytest.raises(PolymoeError, match=message):
            invoke(*arguments, *options)


# --- encoder–decoder families


@pytest.fixture(scope="module")
def switches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random Switch Transformers, close together, with a tokenizer."""
    config = SwitchTransformersConfig(
        vocab_size=112, d_model=64, d_kv=16, d_ff=64, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, decoder_start_token_id=0,
        tie_word_embeddings=False,  # or a random model repeats its input
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    folder, paths = tmp_path_factory.mktemp("switches"), {}
    for name in ("base", "v1", "v2"):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = 0.0 if name == "base" else 0.15 * start[key].std(unbiased=False)
                parameter.copy_(start[key] + noise * torch.randn_like(parameter))
        paths[name] = folder / name
        model.to(torch.bfloat16).save_pretrained(paths[name])
        make_tokenizer(paths[name])
        model.to(torch.float32)
    return paths


def original_of(path: Path) -> OriginalModel:
    return OriginalModel(path, torch.float32, torch.device("cpu"))


def stock(path: Path) -> SwitchTransformersForConditionalGeneration:
    return SwitchTransformersForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def test_a_batch_of_stock_answers_is_each_alone(switches: dict[str, Path]) -> None:
    """Padding changes nothing, neither in answers nor in logits."""
    original, model = original_of(switches["v1"]), stock(switches["v1"])
    inputs = [[5, 9, 30, 31, 7], [4], [8, 50, 60, 2, 3, 90, 100, 20, 11]]
    windows = [[0, 7, 8], [0, 9, 22, 4, 5], [0, 3]]
    answers = greedy_answers(original, "v1", inputs, 12)
    for row, ids in enumerate(inputs):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        assert answers[row][: len(alone)] == alone
    for ids, window, found in zip(inputs, windows, original.logits(windows, inputs), strict=True):
        expected = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([window])).logits[0]
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def task(switches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What v1 itself answers is what is wanted: alone it has everything right."""
    tokenizer, original = VariantTokenizer(switches["v1"]), original_of(switches["v1"])
    words = " ".join(TEXT[:2]).split()
    inputs = [" ".join([*words[i:], *words[:i]][: 3 + i % 5]) for i in range(len(words))] * 2
    lines = []
    for i, text in enumerate(inputs):
        ids = greedy_answers(original, "v1", [tokenizer.encode(text)], 8)[0]
        target = tokenizer.decode(ids[: ids.index(1)] if 1 in ids else ids)
        if any(letter.isalpha() for letter in target):
            lines.append(json.dumps({"input": text, "target": target, "number": i}))
    return write_pairs(tmp_path_factory.mktemp("task") / "v1.jsonl", lines)


def test_the_variant_is_perfect_on_its_own_task(switches: dict[str, Path], task: Path, tmp_path: Path) -> None:
    family = Family.open(switches)
    evaluation = TaskEvaluation(family, "v1", draw_pairs("v1", task, 24, seed=0), 8, tmp_path, batch=7)
    alone = evaluation.alone(nothing)
    assert statistics.fmean(alone.rouge["rouge1"]) == 1, "the targets are what it says"
    bundle = make_plan(switches, "separate", None, tmp_path / "bundle")
    served = evaluation.of_engine(served_by(bundle, evaluation), nothing)
    assert served.rouge == alone.rouge
    assert served.fidelity.kl < 1e-6
    assert served.fidelity.top1 == 1
    assert served.fidelity.tokens == alone.fidelity.tokens
    own, other = family.checkpoints[1], family.checkpoints[2]
    same = evaluation.of_weights(((n, own.tensor(n)) for n in own.target_names), nothing)
    assert same.rouge == alone.rouge
    experts = [n for n in other.target_names if ".experts." in n]
    assert experts
    swapped = evaluation.of_weights(((n, other.tensor(n)) for n in experts), nothing)
    assert swapped.fidelity.kl > 1e-4


def test_the_whole_table_of_a_switch_family(switches: dict[str, Path], task: Path, tmp_path: Path) -> None:
    result = invoke(
        *specs(switches)[:2], "--task", f"v1={task}", "--samples", "20", "--max-new-tokens", "8",
        "--calibrate", f"v1={task}", "--out", str(tmp_path),
    )  # fmt: skip
    found = last_line(result)
    rows = found["rows"]
    assert [row["count"] for row in rows] == [1, *[2] * 10], found["skipped"]
    assert rows[0]["rouge1"]["mean"] == 1
    for row in rows:
        assert 0 <= row["rouge2"]["mean"] <= row["rouge1"]["mean"] <= 1
        assert row["rouge1_kept"]["mean"] == pytest.approx(row["rouge1"]["mean"])
    by_name = {row["name"]: row for row in rows}
    assert by_name["auto 1.0x"]["kl"] < by_name["paper"]["kl"] / 4
    for plain, fitted in (("auto 1.0x", "auto 1.0x, on text"), ("mean experts, own non-experts", "regmean, on text")):
        assert by_name[fitted]["expert_multiple"] <= 1
        assert by_name[fitted]["kl"] < by_name[plain]["kl"], "on the text itself"
    assert by_name["auto 1.0x"]["rouge1"]["mean"] >= by_name["average of everything"]["rouge1"]["mean"]
    best = found["best_share_of_rouge1"]["v1, 2"]
    assert best["share"] == max(r["rouge1_kept"]["mean"] for r in rows if r["group"] in ("delta", "auto"))
    report = (tmp_path / "merging.md").read_text()
    assert "ROUGE-1" in report
    assert "On text: fitted to v1 v1.jsonl." in report
    assert (tmp_path / "merging.png").read_bytes().startswith(b"\x89PNG")


def test_bad_tasks_name_the_fix(switches: dict[str, Path], task: Path, text: Path, tmp_path: Path) -> None:
    long = write_pairs(tmp_path / "long.jsonl", [json.dumps({"input": "the fox " * 400, "target": "b"})] * 20)
    arguments = (*specs(switches), "--out", str(tmp_path))
    for options, message in [
        (["--text", f"v1={text}"], "encoder–decoder family; give --task"),
        ([], "give --task NAME=FILE.jsonl"),
        (["--task", f"v1={task}", "--variant", "v2"], "v2 has nothing to be asked; give --task v2="),
        (["--task", f"v1={text}"], "held-out.txt, line 1 is not JSON"),
        (["--task", f"v1={long}"], "an input may be .* leave out what is longer"),
        (["--task", f"v1={task}", "--max-new-tokens", "100000"], "--max-new-tokens"),
    ]:
        with pytest.raises(PolymoeError, match=message):
            invoke(*arguments, *options)
