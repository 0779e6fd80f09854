"""Every policy, calibration and eval on families of every kind: hybrids, quantised ones, parts of multimodal models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from families import make_family
from hub_layouts import as_on_the_hub
from polymoe import LLM, SamplingParams
from polymoe.cli.main import app
from polymoe.offline.api import inspect, make_plan
from polymoe.offline.plan.options import POLICIES, PlanOptions
from quantised import store_awq, store_block_fp8, store_mxfp4

TEXT = "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5\n" * 40
# Name -> (architecture, config fields, how it is stored)
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "gated_delta": ("qwen3_5_moe_text", {}, lambda folder: as_on_the_hub("qwen3_5_moe_text", folder)),
    "mamba": ("nemotron_h", {}, lambda _: None),
    "sparse_attention_fp8": ("deepseek_v32", {}, lambda folder: as_on_the_hub("deepseek_v32", folder)),
    "fp8": ("qwen3_moe", {}, store_block_fp8),
    "mxfp4": ("gpt_oss", {"intermediate_size": 32}, store_mxfp4),
    "awq": ("qwen3_moe", {}, store_awq),
}


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    arch, fields, store = FAMILIES[request.param]
    paths = make_family(arch, tmp_path_factory.mktemp("family"), 2, perturb=0.1, tokenizer=True, **fields)
    for path in paths.values():
        store(path)
    return paths


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def answers(bundle: Path, names: dict[str, Path]) -> None:
    llm = LLM(bundle, device="cpu", dtype="float32", kv_cache_bytes=1 << 22, block_size=4)
    outputs = llm.generate([[5, 9, 33, 70]] * len(names), SamplingParams(max_tokens=3), variants=list(names))
    assert all(output.outputs[0].token_ids for output in outputs)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in ("separate", "auto")])
@pytest.mark.parametrize("made", ["gated_delta", "mxfp4"], indirect=True)
def test_policies(made: dict[str, Path], policy: str, text: Path, tmp_path: Path) -> None:
    options = PlanOptions(calibrate={name: [text] for name in made} if policy == "regmean" else {})
    answers(make_plan(made, policy, None, tmp_path / "bundle", options=options).path, made)


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_a_lossless_plan_is_its_originals(made: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """As `polymoe eval` sees them, whatever they were stored in."""
    bundle = make_plan(made, "separate", None, tmp_path / "bundle").path
    arguments = ["eval", str(bundle), "--limit", "2", "--device", "cpu", "--dtype", "float32"]
    for name in made:
        arguments += ["--text", f"{name}={text}"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for figures in json.loads(result.stdout.strip().splitlines()[-1])["variants"].values():
        assert figures["kl"] < 1e-6
        assert figures["tokens"] > 100


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_auto_is_fitted_to_text(made: dict[str, Path], text: Path, tmp_path: Path) -> None:
    scan = inspect(made, None)
    assert 0 < scan.relative_distance.mean() < 1
    options = PlanOptions(calibrate={name: [text] for name in made})
    bundle = make_plan(made, "auto", "0.9x", tmp_path / "bundle", options=options)
    answers(bundle.path, made)
