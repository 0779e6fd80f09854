"""`benchmarks.quality` on a tiny family, its baselines' arithmetic, and fidelity from `plan --text` to the server."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks.baselines.deltas import even_levels, nested, num_vectors, sign_and_rank
from benchmarks.baselines.methods import GROUPS, methods
from benchmarks.baselines.weights import make_baseline, rounded_to_nearest
from benchmarks.quality.__main__ import app as quality_app
from benchmarks.quality.conclusions import conclusions, spearman
from benchmarks.quality.report import quality_report
from benchmarks.quality.row import Row
from benchmarks.quality.tables import DOCS, with_tables
from families import TEXT, make_family
from polymoe.bundle.reader import Bundle
from polymoe.cli.main import app
from polymoe.errors import PolymoeError
from polymoe.evaluate.texts import spread_windows
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import FamilyScan, scan_family


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide enough for groups of 64, close enough for deltas to be small."""
    folder = tmp_path_factory.mktemp("family")
    return make_family(
        "mixtral", folder, perturb=0.1, dtype=torch.bfloat16, tokenizer=True, hidden_size=64, intermediate_size=64
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("\n".join(TEXT * 20))
    return path


@pytest.fixture(scope="module")
def family(checkpoints: dict[str, Path]) -> Family:
    return Family.open(checkpoints)


@pytest.fixture(scope="module")
def scan(family: Family) -> FamilyScan:
    return scan_family(family)


def specs(checkpoints: dict[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in checkpoints.items()]


def texts(checkpoints: dict[str, Path], text: Path, option: str = "--text") -> list[str]:
    return [part for name in checkpoints for part in (option, f"{name}={text}")]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def quality(*arguments: str) -> Result:
    return CliRunner().invoke(quality_app, list(arguments), catch_exceptions=False)


# --- the baselines


def test_rounding_has_the_best_step_of_the_grid() -> None:
    weight = torch.randn(6, 150, generator=torch.Generator().manual_seed(0))
    rounded = rounded_to_nearest(weight, 4)
    naive = weight.clone()
    for group in (slice(0, 64), slice(64, 128), slice(128, 150)):
        scale = weight[:, group].abs().amax(dim=1, keepdim=True) / 7
        naive[:, group] = (weight[:, group] / scale).round() * scale
        for row in rounded[:, group]:
            assert len(row.unique()) <= 16
    assert float((rounded - weight).square().sum()) < float((naive - weight).square().sum())
    assert float((rounded_to_nearest(weight, 8) - weight).abs().max()) < 0.02


def test_baselines_count_their_bytes_and_change_what_they_say(family: Family, scan: FamilyScan) -> None:
    one_model = scan.expert_bytes * scan.expert_same_as[0].size
    average = make_baseline("average", family, scan)
    assert average.expert_bytes == one_model
    mean = dict(average.weights(1))
    name = "model.norm.weight"
    expected = torch.stack([c.tensor(name).float() for c in family.checkpoints]).mean(dim=0).bfloat16()
    assert torch.equal(mean[name], expected)
    assert set(mean) == set(family.checkpoints[0].target_names)

    one = dict(make_baseline("one-nonexperts", family, scan).weights(2))
    assert torch.equal(one[name], family.checkpoints[0].tensor(name))
    experts = [n for n in one if ".experts." in n]
    owners = {
        v
        for n in experts
        for e, stack in enumerate(one[n])
        for v, checkpoint in enumerate(family.checkpoints)
        if torch.equal(stack, checkpoint.tensor(n)[e])
    }
    assert owners == {0, 1, 2}, "round-robin gives every variant some"

    copies = make_baseline("int4-copies", family, scan)
    # 4 bits and a 16-bit scale for 64 values, of three variants.
    assert copies.expert_bytes == 3 * one_model * (4 + 16 / 64) / 16
    assert {n for n, _ in copies.weights(0)} == set(experts)
    assert copies.nonexpert_bytes == scan.nonexpert_bytes_total


def test_other_ways_to_write_a_delta(family: Family, scan: FamilyScan) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(32, 128, generator=generator)
    weight = mean + 0.05 * torch.randn(32, 128, generator=generator)
    base, scales = even_levels(mean, 6)
    for bits in (1, 2, 3):
        found = nested(weight, base, scales, bits)
        steps = ((found - base) / scales.view(32, 1)).abs()  # odd multiples of half a power of two, row by row
        halves = steps / steps.amin(dim=1, keepdim=True)
        assert torch.allclose(halves, halves.round(), atol=1e-3)
        assert set(halves.round().unique().tolist()) <= set(range(1, 2**bits, 2))
        assert torch.allclose(steps.amin(dim=1).log2(), steps.amin(dim=1).log2().round(), atol=1e-3)
    assert num_vectors(32, 128, 2) == 32 * 128 // (8 * (32 + 128 + 4))
    low = mean + torch.outer(torch.randn(32, generator=generator), torch.randn(128, generator=generator))
    error = (sign_and_rank(low, mean, scales, 2) - low).norm() / (low - mean).norm()
    assert error < 0.02, "a difference of rank one"
    plain = make_baseline("nested-8-2", family, scan)
    assert dict(plain.weights(0)).keys() == dict(make_baseline("rank-8-2", family, scan).weights(0)).keys()
    positions, matrices = scan.expert_same_as[0].size, 3
    # a base in 8 bits and three deltas in 2, each with a 16-bit scale a row
    assert plain.expert_bytes == positions * matrices * 64 * (64 * (8 + 3 * 2) // 8 + 4 * 2)


# --- the table


def test_rows_with_and_without_text() -> None:
    plain = methods(4, list(GROUPS), ["1.0x"], with_text=False)
    both = methods(4, list(GROUPS), ["1.0x"], with_text=True)
    assert len({row.name for row in both}) == len(both)
    assert not any(row.on_text for row in plain)
    assert {row.name for row in plain} <= {row.name for row in both}
    assert {row.name: row.memory for row in plain if row.policy == "paper"} == {
        "paper": "1.0x", "paper, 75 % shared": "1.75x", "paper, 50 % shared": "2.5x",
    }  # fmt: skip
    with pytest.raises(PolymoeError, match="unknown system magic"):
        methods(4, ["magic"], ["1.0x"], with_text=False)


def test_ranks() -> None:
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def _row(name: str, group: str, resident: int, kl: float, on_text: bool = False) -> Row:
    return Row(name, group, on_text, resident, resident / 100, resident, kl, kl, 0.9, kl, {}, 1.0)


def test_conclusions_name_the_row_that_beats_auto() -> None:
    rows = [
        _row("auto 1.0x", "auto", 100, 0.01),
        _row("auto 1.0x, on text", "auto", 100, 0.001, on_text=True),
        _row("int4 copies", "copies", 106, 0.005),
        _row("odd", "delta", 90, 0.009),
        _row("odd, on text", "delta", 90, 0.0095, on_text=True),
    ]
    found = conclusions({row.name: row for row in rows})
    assert found["beaten_by"] == {"auto 1.0x": ["odd"], "auto 1.0x, on text": []}
    assert found["cheapest_as_good"]["auto 1.0x"]["name"] == "odd"
    assert found["cheapest_as_good"]["auto 1.0x, on text"] is None
    assert found["worse_on_text"] == ["odd, on text"]
    assert found["rank_correlation"]["weights"]["spearman"] == pytest.approx(1)
    better = {row.name: replace(row, kl_mean=row.kl_mean * 2) if row.group == "delta" else row for row in rows}
    assert conclusions(better)["beaten_by"]["auto 1.0x"] == []


def test_windows_are_spread_over_the_text() -> None:
    ids = list(range(103))
    assert [w[0] for w in spread_windows(ids, 10, 4)] == [0, 30, 60, 90]
    assert [w[0] for w in spread_windows(ids, 10, None)] == list(range(0, 100, 10))
    assert spread_windows(ids, 200, 3) == [ids]
    assert spread_windows(ids, 10, 1) == [ids[:10]]


@pytest.fixture(scope="module")
def run(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    arguments = (
        *specs(checkpoints), *texts(checkpoints, text), "--windows", "2", "--window", "32",
        "--budgets", "0.1x,1.0x", "--cache", str(folder / "cache"), "--out", str(folder / "out"),
    )  # fmt: skip
    result = quality(*arguments)
    assert result.exit_code == 0, result.output
    return {"arguments": arguments, "folder": folder, "results": json.loads(result.stdout.strip().splitlines()[-1])}


def test_the_whole_table(run: dict[str, Any]) -> None:
    systems, folder = run["results"]["systems"], run["folder"]
    assert {row["group"] for row in systems.values()} == set(GROUPS)
    assert systems["paper"]["expert_multiple"] == 1.0
    assert systems["paper, 50 % shared"]["expert_multiple"] == 2.0
    assert systems["auto 1.0x"]["expert_multiple"] <= 1.0
    assert systems["int8 copies"]["kl_mean"] < systems["int4 copies"]["kl_mean"] < systems["int3 copies"]["kl_mean"]
    for base in ("stored", "int8", "int4"):
        kl = [systems[f"{base} + {bits} bit"]["kl_mean"] for bits in (1, 2, 3, 4)]
        assert kl == sorted(kl, reverse=True)
    for row in systems.values():
        assert row["resident_bytes"] > row["expert_bytes"]
        assert row["kl_worst"] == max(figures["kl"] for figures in row["variants"].values())
        originals = {name: figures["perplexity_original"] for name, figures in row["variants"].items()}
        assert originals == {n: f["perplexity_original"] for n, f in systems["paper"]["variants"].items()}
    assert list(run["results"]["skipped"]) == ["auto 0.1x"]
    assert "minimum" in run["results"]["skipped"]["auto 0.1x"]
    assert run["results"]["rank_correlation"]["weights"]["spearman"] > 0.5
    markdown = (folder / "out" / "quality.md").read_text()
    assert "| average of everything |" in markdown
    assert "Not measured: auto 0.1x" in markdown
    assert (folder / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "out" / "quality.json").read_text()) == run["results"]


def test_a_second_run_finds_what_the_first_measured(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.baselines.comparison.Comparison._planned", None)
    monkeypatch.setattr("benchmarks.baselines.comparison.Comparison._baseline", None)
    result = quality(*run["arguments"], "--systems", "paper,copies")
    found = json.loads(result.stdout.strip().splitlines()[-1])["systems"]
    assert found == {n: row for n, row in run["results"]["systems"].items() if row["group"] in ("paper", "copies")}


def test_rows_of_other_sources_are_measured_again(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PolymoeError("measured again")

    monkeypatch.setattr("benchmarks.baselines.comparison.Comparison._planned", refuse)
    monkeypatch.setattr("benchmarks.quality.lab.sources", lambda: "a kernel's sum changed")
    found = json.loads(quality(*run["arguments"], "--systems", "paper").stdout.strip().splitlines()[-1])
    assert found["skipped"]["paper"] == "measured again"


def test_tables_of_the_page_are_those_of_the_reports(run: dict[str, Any], tmp_path: Path) -> None:
    page = (DOCS / "quality.md").read_text()
    assert page.count("<!-- end -->") == 9
    assert with_tables(page, DOCS / "quality") == page, "run python -m benchmarks.quality.tables"

    blank = "".join(
        f"a\n<!-- {kind} of quality -->\nold\n<!-- end -->\nb\n" for kind in ("fidelity", "as good", "verdict")
    )
    (tmp_path / "quality.json").write_text(json.dumps(run["results"]))
    made = with_tables(blank, tmp_path)
    row = run["results"]["systems"]["int8 + 2 bit"]
    assert f"| int8 + 2 bit | {row['expert_multiple']:.3f}x |" in made
    assert f"| {row['top1_mean']:.4f} |  |  |  |\n" in made, "nothing was fitted to text"
    assert "| **auto 1.0x** |" in made
    assert f"Spearman {run['results']['rank_correlation']['weights']['spearman']:.3f} over" in made
    assert "old" not in made
    (tmp_path / "quality.json").unlink()
    (tmp_path / "quality.md").write_text(quality_report(run["results"]).markdown())
    assert with_tables(blank, tmp_path) == made, "the report alone is enough"
    with pytest.raises(PolymoeError, match=r"neither .*quality.json nor .*quality.md is there"):
        with_tables(blank, tmp_path / "elsewhere")
    (tmp_path / "quality.md").write_text("# Another page\n")
    with pytest.raises(PolymoeError, match="no table 'Fidelity'"):
        with_tables(blank, tmp_path)


def test_text_for_plans_makes_more_rows(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    result = quality(
        *specs(checkpoints), *texts(checkpoints, text), *texts(checkpoints, text, "--calibrate"),
        "--windows", "2", "--window", "32", "--budgets", "1.0x", "--systems", "auto,copies",
        "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    systems = json.loads(result.stdout.strip().splitlines()[-1])["systems"]
    assert {"auto 1.0x", "auto 1.0x, on text", "int4 copies, on text"} <= set(systems)
    assert systems["auto 1.0x, on text"]["expert_multiple"] <= 1.0
    assert all(math.isfinite(row["kl_mean"]) for row in systems.values())
    made = with_tables("<!-- fidelity of quality -->\n<!-- end -->", tmp_path / "out")
    figures = [systems[name] for name in ("auto 1.0x", "auto 1.0x, on text")]
    both = " | ".join(f"{r['kl_mean']:.5f} | {r['kl_worst']:.5f} | {r['top1_mean']:.4f}" for r in figures)
    assert f" | {both} |\n" in made, "side by side"
    assert not list((tmp_path / "cache" / "quality").glob("calibration-*")), "what was fitted is removed at the end"


def test_bad_input_names_the_fix(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    arguments = (*specs(checkpoints), "--cache", str(tmp_path), "--out", str(tmp_path))
    for options, message in [
        ([], "--text VARIANT=FILE"),
        (["--text", f"v1={short}"], "at least 256"),
        (["--text", f"poet={text}"], "poet"),
        (["--text", f"v1={text}", "--systems", "swap"], "unknown system swap"),
        (["--text", f"v1={text}", "--calibrate", f"poet={text}"], "poet"),
    ]:
        with pytest.raises(PolymoeError, match=message):
            quality(*arguments, *options)


# --- fidelity in the bundle


def test_plan_ends_with_the_measurement(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    from servers import ThreadServer, engine_config

    bundle = tmp_path / "bundle"
    how = ("--policy", "delta", "--base", "int4", "--delta-bits", "1", "--out", str(bundle))
    invoke("plan", *specs(checkpoints), *how,
           "--text", f"v1={text}", "--text", f"base={text}")  # fmt: skip
    base, v1, v2 = Bundle.open(bundle).variants
    assert base.fidelity is not None
    assert v1.fidelity is not None
    assert v2.fidelity is None
    assert v1.fidelity.text == str(text)
    assert v1.fidelity.tokens > 200
    assert 0 < v1.fidelity.kl < 5
    assert 0 < v1.fidelity.top1 <= 1
    assert v1.fidelity.perplexity_served > 1
    assert f"{v1.fidelity.kl:.5f}" in invoke("inspect", str(bundle)).output

    with ThreadServer(engine_config(bundle)) as server:
        cards = {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert cards["v1"]["fidelity"]["kl"] == v1.fidelity.kl
        assert cards["v1"]["fidelity"]["text"] == str(text)
        assert cards["v2"]["fidelity"] is None
        metrics = httpx.get(f"{server.url}/metrics").text
        assert f'polymoe:fidelity_kl{{model_name="v1"}} {v1.fidelity.kl}' in metrics
        assert f'polymoe:fidelity_top1{{model_name="base"}} {base.fidelity.top1}' in metrics
        assert 'fidelity_kl{model_name="v2"}' not in metrics


def test_a_bad_text_is_refused_before_planning(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("fox")
    with pytest.raises(PolymoeError, match=r"has \d+ tokens; at least 256"):
        invoke("plan", *specs(checkpoints), "--out", str(tmp_path / "bundle"), "--text", f"v1={short}")
    assert not (tmp_path / "bundle").exists()


# --- the gentle family


def test_gentle_fine_tunes_stop_at_their_distance(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parent.parent / "tools" / "make_gentle_family.py"
    spec = importlib.util.spec_from_file_location("make_gentle_family", script)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    arguments = ["--base", str(checkpoints["base"]), "--out", str(tmp_path / "out"), "--lr", "2e-4"]
    monkeypatch.setattr("sys.argv", [str(script), f"a={text}", f"b={text}+{text}", *arguments])
    tool.main()
    family = Family.open({name: tmp_path / "out" / name for name in ("base", "a", "b")})
    apart = scan_family(family).pair_distance
    assert 0.02 < apart[0, 1] < 0.04
    assert 0.02 < apart[0, 2] < 0.04
    assert apart[1, 2] > 0
