"""The quality report: nothing lost where nothing is shared, something lost where experts are, and the right numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from polymoe.cli.main import app
from polymoe.demo import family_paths, text_paths
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import OriginalModel, _Sums, windows_of
from polymoe.offline.api import make_plan

TEXTS = [f"{name}={path}" for name, path in text_paths().items()]


def evaluate(bundle: Path, *options: str) -> dict[str, Any]:
    arguments = ["eval", str(bundle), "--limit", "6", "--device", "cpu", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return report


def text_options(*names: str) -> list[str]:
    return [part for text in TEXTS if text.split("=")[0] in names or not names for part in ("--text", text)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("eval")
    found = {}
    for policy in ("separate", "paper"):
        bundle = make_plan(family_paths(), policy, None, folder / policy).path
        found[policy] = evaluate(bundle, *text_options())
    return found


def test_a_lossless_plan_loses_nothing(reports: dict[str, dict[str, Any]]) -> None:
    for figures in reports["separate"]["variants"].values():
        assert figures["kl"] < 1e-6
        assert figures["top1_agreement"] > 0.999
        assert figures["ppl_served"] == pytest.approx(figures["ppl_original"], rel=1e-4)
        assert figures["tokens"] == 6 * 255


def test_the_papers_plan_costs_one_models_experts_and_some_fidelity(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["paper"]
    assert set(report) == {"variants", "resident_bytes", "bytes_per_expert_parameter"}
    assert report["bytes_per_expert_parameter"] == 2.0
    assert reports["separate"]["bytes_per_expert_parameter"] == 8.0
    for name, figures in report["variants"].items():
        assert 0.001 < figures["kl"] < 1.0
        assert figures["ppl_original"] == reports["separate"]["variants"][name]["ppl_original"]


def test_every_fine_tune_is_best_in_its_own_domain() -> None:
    """What makes the demo family a family of real fine-tunes."""
    from polymoe.text.tokenizer import VariantTokenizer

    perplexity: dict[str, dict[str, float]] = {}
    for name, path in family_paths().items():
        model, tokenizer = OriginalModel(path, torch.float32, torch.device("cpu")), VariantTokenizer(str(path))
        for domain, text in text_paths().items():
            ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
            windows, sums = windows_of(ids, 256, 8), _Sums()
            for window, logits in zip(windows, model.logits(windows), strict=True):
                sums.add(window, logits, logits)
            perplexity.setdefault(domain, {})[name] = sums.result().perplexity_original
    for domain in ("math", "drama", "code"):
        assert min(perplexity[domain], key=perplexity[domain].__getitem__) == domain, perplexity[domain]


def test_the_sums_are_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    window = [1, 4, 2, 8, 0]
    sums = _Sums()
    sums.add(window, p, q)
    result = sums.result()
    kl = agreed = nll = 0.0
    for t in range(4):
        a, b = torch.softmax(p[t], 0).tolist(), torch.softmax(q[t], 0).tolist()
        kl += sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)) / 4
        agreed += (a.index(max(a)) == b.index(max(b))) / 4
        nll -= math.log(b[window[t + 1]]) / 4
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1 == agreed
    assert result.perplexity_served == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.tokens == 4


def test_windows() -> None:
    assert windows_of(list(range(10)), 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows_of(list(range(9)), 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(list(range(10)), 4, 1) == [[0, 1, 2, 3]]


def test_bad_input_names_the_fix(tmp_path: Path) -> None:
    bundle = make_plan(family_paths(), "paper", None, tmp_path / "bundle").path
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for options, message in [
        (["--text", "poet=README.md"], "poet"),
        (["--text", "math=/nowhere.txt"], "does not exist"),
        (["--text", "math"], "VARIANT=PATH"),
        (["--text", f"math={empty}"], "fewer than two tokens"),
        ([*text_options("math"), "--window", "9999"], "2048"),
        ([*text_options("math"), "--original", f"math={tmp_path / 'x'}"], "does not exist"),
    ]:
        with pytest.raises(PolymoeError, match=message):
            CliRunner().invoke(app, ["eval", str(bundle), *options], catch_exceptions=False)


def test_a_moved_original_is_asked_for(tmp_path: Path) -> None:
    import shutil

    for name, path in family_paths().items():
        shutil.copytree(path, tmp_path / name)
    paths = {name: tmp_path / name for name in family_paths()}
    bundle = make_plan(paths, "paper", None, tmp_path / "bundle").path
    (tmp_path / "math").rename(tmp_path / "moved")
    with pytest.raises(PolymoeError, match="--original math="):
        CliRunner().invoke(app, ["eval", str(bundle), *text_options("math")], catch_exceptions=False)
    report = evaluate(bundle, *text_options("math"), "--original", f"math={tmp_path / 'moved'}")
    assert list(report["variants"]) == ["math"]


def test_bfloat16_stays_close_to_the_original_in_bfloat16(tmp_path: Path) -> None:
    """Rounding may flip a routing tie, so bfloat16 is compared by distributions, not by values."""
    bundle = make_plan(family_paths(), "separate", None, tmp_path / "bundle").path
    for figures in evaluate(bundle, *text_options(), "--dtype", "bfloat16")["variants"].values():
        assert figures["kl"] < 2e-3
        assert figures["top1_agreement"] > 0.96
