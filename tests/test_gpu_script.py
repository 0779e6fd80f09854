"""`benchmarks/gpu/run.sh` end to end on a CPU, tiny: all that must not fail in the few minutes that a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU's kernels need Triton")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "run.sh"


def run(out: Path, *options: str) -> tuple[int, dict[str, object]]:
    command = ["bash", str(SCRIPT), str(out), "--device", "cpu", "--shape", "tiny", *options]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    last: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads((out / "results.json").read_text())
    return done.returncode, last


@pytest.mark.slow
def test_every_part_runs_and_every_target_has_a_figure(tmp_path: Path) -> None:
    code, report = run(tmp_path)
    parts, targets = report["parts"], report["targets"]
    assert isinstance(parts, dict)
    assert isinstance(targets, list)
    assert code == 0, {name: figures.get("log") for name, figures in parts.items() if "error" in figures}
    assert parts["kernels"]["checks"] > 10
    assert {row["name"]: row["value"] for row in targets if row["value"] is None} == {}
    assert set(parts["scenario"]["systems"]) == {"mixed", "single", "reconfigure", "paper", "partition", "swap"}
    assert all("skipped" not in figures for figures in parts["scenario"]["systems"].values())


def test_a_part_out_of_time_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    code, report = run(tmp_path, "--parts", "kernels,mixtral_two", "--seconds", "3", "--least", "2.5")
    parts = report["parts"]
    assert isinstance(parts, dict)
    assert code == 1
    assert parts["kernels"].get("error", "stopped after").startswith("stopped after")
    assert "not started" in parts["mixtral_two"]["error"]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "logs.tar.gz"}
