"""The switch that turns skips into failures."""

import os
from pathlib import Path

import pytest

from zygote import run_python

PYTEST = "import sys, pytest; sys.path.insert(0, sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
SKIPS = """
import pytest, torch

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_elsewhere(): pass

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU candidates are timed")
def test_here(): pass

def test_never():
    pytest.skip("a bad day")

@pytest.mark.xfail(reason="known")
def test_expected():
    assert False
"""


def run(folder: Path, strict: bool, **settings: str) -> tuple[int, str]:
    environment = os.environ | {"POLYMOE_STRICT_TESTS": str(int(strict)), **settings}
    options = ["-p", "strict", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)]
    done = run_python(PYTEST, str(Path(__file__).parent), *options, cwd=folder, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_a_skip_needs_a_reason_that_holds(tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    assert run(tmp_path, strict=False)[0] == 0
    code, output = run(tmp_path, strict=True)
    assert code != 0
    assert "POLYMOE_STRICT_TESTS" in output
    assert "no_such_module" in output
    (tmp_path / "test_module.py").unlink()
    code, output = run(tmp_path, strict=True)
    assert "'Skipped: a bad day' is no reason" in output
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed" in output
    assert code == 1


def test_a_missing_library_is_a_failure_where_it_could_run(tmp_path: Path) -> None:
    from polymoe.native.installed import processor_suits

    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    code, output = run(tmp_path, strict=True, POLYMOE_KERNELS=str(tmp_path / "none.so"))
    if processor_suits():
        assert code == 1
        assert "POLYMOE_STRICT_TESTS: the CPU kernels are not built" in output
    else:
        assert code == 0
    assert run(tmp_path, strict=False, POLYMOE_KERNELS=str(tmp_path / "none.so"))[0] == 0


@pytest.mark.parametrize("value", ["", "0"])
def test_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import strict

    monkeypatch.setenv("POLYMOE_STRICT_TESTS", value)
    assert not strict.is_on()
