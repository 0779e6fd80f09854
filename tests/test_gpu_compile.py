"""Every GPU kernel compiled to machine code for real shapes, without a GPU: what the interpreter cannot vouch for.

A process of its own, since Triton decides at its import whether it interprets. It must fit the shared memory of its
target and keep (nearly) all values in registers; whether it is fast, only a GPU tells.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU kernels need triton")

SCRIPT = Path(__file__).parent / "gpu_compile.py"
SHARED = {"80": 163 * 1024, "90": 227 * 1024}


@pytest.mark.parametrize(
    "arguments",
    [
        ["90"],
        pytest.param(["90", "all"], marks=pytest.mark.slow),
        pytest.param(["80", "all"], marks=pytest.mark.slow),
    ],
)
def test_kernels_fit_the_device(arguments: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    if not kernels:
        pytest.skip("this triton has no assembler for NVIDIA GPUs")
    names = {kernel["name"] for kernel in kernels}
    assert len(names) == 8, names
    assert len(kernels) >= 13
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[arguments[0]], kernel
        assert kernel["bytes"] > 0
