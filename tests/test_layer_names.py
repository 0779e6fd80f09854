"""A layer has one number, whoever prints it: the model's own."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from families import make_family
from polymoe.bundle.layer_names import layer_names
from polymoe.console import Console
from polymoe.offline.api import inspect, inspect_bundle, make_plan
from polymoe.offline.plan.options import PlanOptions


def test_names() -> None:
    assert layer_names(["model.layers.1.mlp.experts", "model.layers.12.mlp.experts"]) == ["1", "12"]
    assert layer_names(["encoder.block.1.layer.1.mlp", "decoder.block.3.layer.2.mlp"]) == ["encoder 1", "decoder 3"]
    assert layer_names(["experts"]) == ["0"]


def layers_in(show: Callable[[Console], object]) -> list[str]:
    """The first cells of a printed table that are numbers of layers."""
    file = io.StringIO()
    show(Console(file=file, width=150))
    cells = [line.split("│")[1].strip() for line in file.getvalue().splitlines() if "│" in line]
    return [cell for cell in cells if re.fullmatch(r"((en|de)coder )?[0-9]+", cell)]


@pytest.mark.parametrize(
    ("arch", "layers"), [("deepseek_v3", ["1", "2"]), ("switch_transformers", ["encoder 1", "decoder 1"])]
)
def test_both_inspects_number_layers_alike(arch: str, layers: list[str], tmp_path: Path) -> None:
    """With a leading dense layer checkpoints had layers 1 and 2, and the bundle made of them 0 and 1."""
    paths = make_family(arch, tmp_path / "checkpoints", 2, perturb=0.1, tokenizer=arch == "switch_transformers")
    made = make_plan(paths, "paper", "1.0x", tmp_path / "bundle", options=PlanOptions(base="int8"))
    assert layers_in(lambda console: inspect(paths, None, console)) == layers
    assert layers_in(lambda console: inspect_bundle(made.path, console)) == layers
