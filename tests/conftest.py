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
from polymoe.client import connection
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import FamilyScan, scan_family
from strict import pytest_make_collect_report, pytest_runtest_makereport, pytest_sessionstart  # noqa: F401
from zygote import engine_starter, zygote

torch.set_num_threads(1)

# Files of ten seconds or more, the longest first: a file is one piece of work (`--dist loadfile`), and none of them may
# be what one worker still has when the others are done. `make tests` keeps the order with --no-loadscope-reorder.
LONGEST = (
    "exactness", "compressed", "install", "server_life", "benchmark_quality", "readme", "device_path", "bundle_damage",
    "bench", "gpu_experts", "resident_memory", "demo", "benchmark_merging", "switch_calibrate", "switch_offline",
    "offline_bundle", "allocate", "eval", "server", "packed_linear", "printing", "python_api", "bench_decoder",
    "cpu_kernels", "family_configs",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same random tensors whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _forked_engines() -> Iterator[None]:
    """Engine processes that tests start are forked from one that has imported what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "start_process", engine_starter(connection.start_process))
        yield
    zygote.close()


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
