"""Shared by all tests: one thread (tiny models are slower with more), quiet transformers, and a family of three."""

import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

gc.disable()  # while modules are imported and tests collected: of what then stays nothing is garbage

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import httpx._transports.default as httpx_transports
import pytest
import torch
from fastapi import FastAPI

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on the CPU; read when triton is imported, below

from families import make_family
from file_times import pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401
from polymoe.client import connection
from polymoe.native import library
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import FamilyScan, scan_family
from polymoe.server import app as server_app
from polymoe.server import openapi, planner
from strict import pytest_make_collect_report, pytest_runtest_makereport, pytest_sessionstart  # noqa: F401
from zygote import ForkedPlanner, engine_starter, zygote

torch.set_num_threads(1)
if kernel_threads := os.environ.get("TEST_KERNEL_THREADS"):  # tools/sanitize.py
    library._own.threads = int(kernel_threads)

# Files of ten seconds or more, the longest first, as the suite prints them at its end: a file is one piece of work
# (`--dist loadfile`), and none of them may be what one worker still has when the others are done. `make tests` keeps
# the order with --no-loadscope-reorder.
LONGEST = (
    "exactness", "live_server", "server_life", "install", "server_limits", "bundle_damage", "device_path",
    "benchmark_merging", "benchmark_quality", "compressed", "gpu_experts", "bench", "every_policy", "resident_memory",
    "python_api", "server", "readme", "offline_bundle", "demo", "structured_outputs", "deploy_ranking", "eval",
    "switch_calibrate", "dashboard", "packed_linear", "switch_offline", "allocate", "printing", "bench_decoder",
    "family_configs",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """The million objects of the imported modules are not looked through again; each time takes a third of a second."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # so that the end finds what refers to itself, about which nanobind would complain


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same random tensors whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _forked_engines() -> Iterator[None]:
    """Engines and planners that tests start are forked from a process that has imported what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "start_process", engine_starter(connection.start_process))
        if sys.platform == "linux":
            patch.setattr(planner, "start_process", ForkedPlanner.start)
        yield
    zygote.close()


@pytest.fixture(scope="session", autouse=True)
def _cheaper_calls() -> Iterator[None]:
    """Each `httpx.get` reads all of the system's certificates, 30 ms, though no server here speaks TLS; each bundle is
    written down to the disk, though no power fails between two tests; each server makes the same /openapi.json, 0.3 s.
    """
    documents: dict[tuple[Any, ...], Any] = {}

    def document(app: FastAPI, needs_key: bool, root_path: str) -> Any:
        key = needs_key, root_path, *(getattr(route, "path", "") for route in app.routes)
        if key not in documents:
            documents[key] = openapi.document(app, needs_key, root_path)
        return documents[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app, "document", document)
        patch.setattr(httpx_transports, "create_ssl_context", functools.cache(httpx_transports.create_ssl_context))
        patch.setattr(os, "fsync", lambda _: None)
        yield


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
