"""Which compiled library is used, and its threads: whoever computes a piece, the sums are the same."""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from polymoe.native import library as cpu

pytestmark = pytest.mark.skipif(cpu.cpu_kernels() is None, reason="the CPU kernels are not built or cannot run here")


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update without a build a function may have other arguments: calling it would write anywhere."""
    monkeypatch.setattr(cpu, "SOURCES", Path(shutil.copytree(cpu.SOURCES, tmp_path / "csrc")))
    assert cpu.cpu_kernels.__wrapped__() is not None
    (tmp_path / "csrc" / "bf16.h").write_text("// changed")
    with pytest.warns(UserWarning, match="built from other sources"):
        assert cpu.cpu_kernels.__wrapped__() is None


def products(seed: int, threads: int) -> list[torch.Tensor]:
    """Linear maps of many sizes one after the other, each by `threads` threads."""
    kernels, found = cpu.cpu_kernels(), []
    assert kernels is not None
    generator, sizes = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in range(60):
        rows, inputs, outputs = sizes.choice([1, 3, 40]), 32 * sizes.randint(1, 6), sizes.randint(1, 300)
        x = torch.randn(rows, inputs, generator=generator).bfloat16()
        weight = torch.randn(1, outputs, inputs, generator=generator).bfloat16()
        ids, starts = torch.zeros(1, dtype=torch.int64), torch.tensor([0, rows])
        out = torch.full((rows, outputs), torch.nan, dtype=torch.bfloat16)
        kernels.polymoe_grouped_linear_bf16(
            x.data_ptr(), inputs, outputs, 1, ids.data_ptr(), starts.data_ptr(), weight.data_ptr(), None,
            out.data_ptr(), threads,
        )  # fmt: skip
        found.append(out)
    return found


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    """More threads than cores too: some of them run late or never."""
    assert same(products(0, threads), products(0, 1))


def test_jobs_of_several_callers_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(products, range(8), [2] * 8))
    for seed, results in enumerate(found):
        assert same(results, products(seed, 1))


def test_a_forked_process_has_threads_of_its_own() -> None:
    products(0, 3)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_sum_of, (1, 3)).get(timeout=60)
    assert found == _sum_of(1, 1)


def _sum_of(seed: int, threads: int) -> float:
    return float(sum(out.double().sum() for out in products(seed, threads)))


LOADED_BY = """
import os, sys

class Stop:
    '''Whoever computes imports transformers after torch: the settings are made by then, and the rest takes seconds.'''
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            from polymoe.native import quiet_torch
            print(quiet_torch.SLEEPS, "torch" in sys.modules, "GOMP_SPINCOUNT" in os.environ, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop())
import {door}
"""


@pytest.mark.parametrize("door", ["polymoe.llm.llm", "polymoe.engine.process"])
def test_torch_is_loaded_with_threads_that_sleep_and_nobody_else_is_told(door: str) -> None:
    """Both doors to the engine load torch themselves; processes that they start keep their own settings."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    found = subprocess.run(
        [sys.executable, "-c", LOADED_BY.format(door=door)], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["True", "True", "False"]
