"""The benchmark of Switch Transformers: its random family, and transformers' own `generate` beside the engines."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from polymoe.bench.family import cached_family
from polymoe.bench.stock import StockSystem
from polymoe.cli.main import app


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def paths(cache: Path) -> dict[str, Path]:
    return cached_family(cache / "families", 2, "switch-tiny")


def test_the_family_is_a_base_and_its_noisy_copies(paths: dict[str, Path], cache: Path) -> None:
    first, second = (
        AutoModelForSeq2SeqLM.from_pretrained(p, dtype=torch.bfloat16).state_dict() for p in paths.values()
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        away = (second[name].float() - tensor.float()).std() / max(tensor.float().std(), 1e-9)
        if tensor.ndim > 1:
            assert away == pytest.approx(0.02, rel=0.3), name
    assert torch.equal(first["lm_head.weight"], first["shared.weight"])
    again = cached_family(cache / "families", 3, "switch-tiny")
    assert list(again) == ["v0", "v1", "v2"]
    assert again["v0"] == paths["v0"]


def test_throughput_beside_stock_transformers(cache: Path, tmp_path: Path) -> None:
    command = (
        "bench throughput --shape switch-tiny --variants 2 --systems mixed,transformers --repeats 1 --requests 6 "
        f"--input-tokens 20 --output-tokens 6 --threads 1 --cache {cache} --out {tmp_path}"
    )
    result = CliRunner().invoke(app, command)
    assert result.exception is None, result.exception
    answer = json.loads(result.stdout.splitlines()[-1])
    assert list(answer["systems"]) == ["mixed", "transformers"]
    for system in answer["systems"].values():
        assert system["output_tokens_per_s"] > 0
        assert system["unfinished"] == 0
    # A decode step of top-1 experts reads neither the encoder nor every expert.
    read = answer["ceiling"]["systems"]["mixed"]["bytes_per_step"]
    expert, layers, experts = 2 * 2 * 64 * 96, 1, 8
    assert 0 < read["experts"] < expert * layers * experts


class _Model:
    """Notes whom `generate` is called for."""

    def __init__(self, name: str, calls: list[tuple[str, list[int]]]) -> None:
        self.name, self.calls = name, calls
        self.config = type("Config", (), {"is_encoder_decoder": True})

    def generate(self, attention_mask: torch.Tensor, **_: object) -> None:
        self.calls.append((self.name, attention_mask.sum(dim=1).tolist()))


def test_a_batch_is_of_one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one whose request has waited longest comes first, with all of its requests that wait."""
    calls: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(StockSystem, "_load", lambda _: {name: _Model(name, calls) for name in "ab"})
    system = StockSystem({}, torch.device("cpu"), "auto", most=2)

    async def one(variant: str, length: int) -> list[int]:
        return [count async for count in system.generate(variant, [1] * length, 5)]

    async def main() -> list[list[int]]:
        await system.start()
        return await asyncio.gather(*(one(v, n) for v, n in (("a", 3), ("b", 1), ("a", 2), ("a", 4))))

    assert asyncio.run(main()) == [[5]] * 4
    assert calls == [("a", [3, 2]), ("b", [1]), ("a", [4])]
