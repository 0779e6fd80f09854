"""Benchmarks of real shapes: Granite's and Qwen3-MoE's, as tiny variants of the same configs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from polymoe.bench.family import cached_family
from polymoe.bench.written_family import GRANITE_1B, QWEN3_5_HYBRID, QWEN3_128E
from polymoe.cli.main import app


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("shape", "millions"), [(GRANITE_1B, 1335), (QWEN3_128E, 491), (QWEN3_5_HYBRID, 427)])
def test_the_shapes_have_their_sizes(shape: dict[str, object], millions: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("shape", ["granite-tiny", "qwen3-tiny"])
def test_the_family_is_a_base_and_its_noisy_copies(shape: str, cache: Path) -> None:
    paths = cached_family(cache / "families", 2, shape)
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict() for path in paths.values()
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        away = (second[name].float() - tensor.float()).std() / tensor.float().norm() * tensor.numel() ** 0.5
        assert away == pytest.approx(0.02, rel=0.4), name
    tied = torch.equal(first["lm_head.weight"], first["model.embed_tokens.weight"])
    assert tied == (shape == "granite-tiny")


@pytest.mark.parametrize("shape", ["granite-tiny", "qwen3-tiny", "hybrid-tiny"])
def test_throughput_of_packed_and_stored_experts(shape: str, cache: Path, tmp_path: Path) -> None:
    command = (
        f"bench throughput --shape {shape} --variants 2 --systems mixed:auto,single:separate --repeats 1 --requests 4 "
        f"--input-tokens 12 --output-tokens 6 --threads 1 --cache {cache} --out {tmp_path}"
    )
    result = CliRunner().invoke(app, command)
    assert result.exception is None, result.exception
    answer = json.loads(result.stdout.splitlines()[-1])
    assert list(answer["systems"]) == ["mixed:auto", "single:separate"]
    for system in answer["systems"].values():
        assert system["output_tokens_per_s"] > 0
        assert system["unfinished"] == 0
