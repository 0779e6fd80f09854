"""Shared by all tests: one thread (tiny models are slower with more), quiet transformers, and a family of three."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on the CPU; read when triton is imported, below

from families import make_family
from polymoe.client import client
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import FamilyScan, scan_family
from strict import pytest_make_collect_report, pytest_runtest_makereport, pytest_sessionstart  # noqa: F401
from zygote import EngineStarter

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same random tensors whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _forked_engines() -> Iterator[None]:
    """Engine processes that tests start are forked from one that has imported what they need."""
    with pytest.MonkeyPatch.context() as patch:
        starter = EngineStarter(client.start_process)
        patch.setattr(client, "start_process", starter)
        yield
        starter.close()


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny Mixtrals with tokenizers; a tensor and expert 2 of every layer are identical in all."""
    return make_family("mixtral", tmp_path_factory.mktemp("trio"), tokenizer=True, frozen="q_proj", frozen_experts=[2])


@pytest.fixture(scope="module")
def family(trio: dict[str, Path]) -> Family:
    return Family.open(trio)


@pytest.fixture(scope="module")
def scan(family: Family) -> FamilyScan:
    return scan_family(family)
