"""The commands as a user types them, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polymoe import LLM
from polymoe.cli.main import app
from polymoe.config import EngineConfig
from polymoe.demo import family_paths
from polymoe.errors import PolymoeError
from polymoe.native import installed
from polymoe.native.library import cpu_kernels
from polymoe.options import options_of, resolve
from zygote import RUN_COMMAND, run_python

SPECS = [f"{name}={path}" for name, path in family_paths().items()]


def polymoe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_python(RUN_COMMAND, *arguments, cwd=cwd)


def test_inspect_plan_generate(tmp_path: Path) -> None:
    inspected = polymoe("inspect", *SPECS, "--png", "heat.png", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")

    planned = polymoe("plan", *SPECS, "--policy", "paper", "--memory", "1.0x", "--out", "bundle", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "1.00x" in planned.stdout
    assert "32 shared" in planned.stdout

    generated = polymoe("generate", "bundle", "--prompt", "ROMEO:", "--max-tokens", "8", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    assert all(name in generated.stdout for name in family_paths())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--prompt", "a"], "not a directory"),
        (["plan", *SPECS, "--out", "b", "--memory", "1KiB"], "below the minimum"),
        (["plan", *SPECS, "--out", "b", "--policy", "magic"], "unknown policy"),
        (["plan", "a=/nowhere", "b=/nowhere", "--out", "b"], "/nowhere"),
        (["plan", SPECS[0], SPECS[0], "--out", "b"], "twice"),
        (["serve", "nowhere", "--host", "0.0.0.0"], "key"),
        (["serve", "nowhere", "--weight", "math"], "write NAME=WEIGHT"),
        (["serve", "nowhere", "--weight", "math=0"], "weight of math must be more than 0"),
        (["serve", "nowhere", "--weight", "a=1", "--weight", "a=2"], "twice"),
        (["serve", "nowhere", "--slo", "fast=soon"], "write NAME=SECONDS"),
        (["serve", "nowhere", "--slo", "fast=-1"], "SLO class fast must be more than 0"),
        (["serve", "nowhere", "--slo", "a b=1"], "no name of an SLO class"),
        (["serve", "nowhere", "--target-itl", "0"], "target_itl must be more than 0"),
        (["serve", "nowhere", "--admission-factor", "-1"], "admission_factor must be more than 0"),
    ],
)
def test_an_error_is_one_message_and_exit_status_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = polymoe(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert result.stderr.startswith("error:")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "b").exists()


MISSING = "polymoe was installed without its compiled CPU kernels: the CPU computes with torch alone."


@pytest.mark.parametrize("command", ["serve", "generate", "LLM"])
def test_without_a_compiled_library_it_is_said_once_at_the_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anything is read, and not when a kernel is first asked for, which may be in another process, or never."""
    monkeypatch.setattr(installed, "library", lambda: tmp_path / "none.so")
    installed.say_if_missing.cache_clear()
    nowhere = str(tmp_path / "nowhere")
    arguments = {"serve": ["serve", nowhere, "--port", "0"], "generate": ["generate", nowhere, "--prompt", "a"]}

    def start() -> None:
        if command == "LLM":
            LLM(nowhere)
        else:
            CliRunner().invoke(app, arguments[command], catch_exceptions=False)

    for _ in range(2):
        with pytest.raises(PolymoeError, match="nowhere"):
            start()
    assert cpu_kernels.__wrapped__() is None  # as the engine's process asks, later
    assert [record.getMessage() for record in caplog.records] == [MISSING]
    installed.say_if_missing.cache_clear()


def test_help_is_fast_and_complete() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert all(command in result.output for command in ("inspect", "plan", "generate", "serve", "demo", "eval"))
    lazy = "import sys, polymoe.cli.main; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lazy], check=True)


def engine_config(bundle: str, **flags: object) -> EngineConfig:
    return EngineConfig(bundle=bundle, **resolve(options_of(EngineConfig), flags, {}).of(EngineConfig))


def test_sizes_and_types_on_the_command_line() -> None:
    config = engine_config("b", kv_cache="2GiB", expert_cache="0", dtype="auto")
    assert (config.kv_cache_bytes, config.expert_cache_bytes) == (2 << 30, 0)
    for bad in ({"kv_cache": "lots"}, {"dtype": "int3"}):
        with pytest.raises(PolymoeError):
            engine_config("b", **bad)
