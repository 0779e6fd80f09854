"""`POLYMOE_STRICT_TESTS=1`: what would be skipped for want of something that this machine ought to have fails.

A test that is skipped everywhere protects nothing, and nobody notices. Here the compiled kernels are required wherever
the processor can run them, Triton wherever it exists, and every other skip needs a reason of `ALLOWED` that holds.
"""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from polymoe.native.installed import instructions, processor_levels, processor_suits
from polymoe.native.library import cpu_kernels, why_no_kernels

NODE_MODULES = Path(__file__).parents[1] / "ui" / "node_modules"
# What a reason says (a regular expression) -> whether that can be true here.
ALLOWED: dict[str, Callable[[], bool]] = {
    r"needs (a )?CUDA": lambda: not torch.cuda.is_available(),
    r"with a GPU": torch.cuda.is_available,
    r"not for this CPU|cannot run here": lambda: not processor_suits(),
    r"no slower level": lambda: len(processor_levels()) < 2,
    r"kernels of tiles": lambda: "avx512_vbmi2" not in instructions(),  # of processors with VBMI and VNNI
    r"PyPI is out of reach": lambda: True,
    r"only root can": lambda: os.geteuid() != 0,
    r"needs .*\.\./shared": lambda: True,
    r"Chromium is not installed": lambda: shutil.which("chromium") is None,
    r"axe-core is not installed": lambda: not NODE_MODULES.is_dir(),
    r"Prometheus is not installed": lambda: shutil.which("prometheus") is None,
    r"no SCREENSHOT": lambda: True,
    r"Ray is not installed": lambda: importlib.util.find_spec("ray") is None,
    r"(helm|systemd) is not installed": lambda: shutil.which("helm") is None or shutil.which("systemd-analyze") is None,
}


def is_on() -> bool:
    return os.environ.get("POLYMOE_STRICT_TESTS", "") not in ("", "0")


def is_allowed(reason: str) -> bool:
    return any(re.search(pattern, reason) and holds() for pattern, holds in ALLOWED.items())


def pytest_sessionstart() -> None:
    if not is_on():
        return
    if processor_suits() and cpu_kernels() is None:
        pytest.exit(f"POLYMOE_STRICT_TESTS: {why_no_kernels()}", returncode=1)
    if sys.platform == "linux" and importlib.util.find_spec("triton") is None:
        pytest.exit("POLYMOE_STRICT_TESTS: Triton is not installed; pip install -e '.[dev]'", returncode=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _judged((yield))


def _judged(report: Any) -> Any:
    """A report of a skip without an allowed reason becomes that of a failure."""
    if is_on() and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not is_allowed(reason):
            report.outcome = "failed"
            report.longrepr = f"POLYMOE_STRICT_TESTS: {reason!r} is no reason to skip on this machine (tests/strict.py)"
    return report
