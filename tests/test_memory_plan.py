"""What a GPU must be told before anything is put on it: too old, too small, taken, or planned for another one."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from polymoe.bundle.manifest import WeightBytes
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.errors import BundleError, ConfigError
from polymoe.model.backends.device_facts import DeviceFacts, choose_device
from polymoe.model.memory_plan import MemoryRequest, plan_memory, workspace_bytes
from polymoe.model.transfer.staging import Staging
from references import ReferenceFamily

GIB = 1 << 30
H100 = DeviceFacts("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
# int4 base and two sets of 3-bit deltas of Mixtral-8x7B, non-experts twice
WEIGHTS = WeightBytes(resident_experts=23 * GIB, deltas=34 * GIB, nonexperts_shared=0, nonexperts_own=6 * GIB, tables=0)
REQUEST = MemoryRequest(
    facts=H100, kv_bytes=None, kv_minimum=4 * GIB, kv_maximum=256 * GIB, expert_cache_bytes=0, workspace_bytes=GIB
)


def test_kv_cache_gets_what_remains() -> None:
    plan = plan_memory(WEIGHTS, REQUEST)
    assert plan.kv_cache > 10 * GIB
    assert WEIGHTS.total + plan.workspace + plan.kv_cache + plan.expert_cache + plan.reserve == H100.free_bytes
    assert plan.reserve >= GIB


def test_kv_cache_as_asked_and_never_more_than_is_of_use() -> None:
    assert plan_memory(WEIGHTS, replace(REQUEST, kv_bytes=5 * GIB)).kv_cache == 5 * GIB
    assert plan_memory(WEIGHTS, replace(REQUEST, kv_maximum=6 * GIB)).kv_cache == 6 * GIB


def test_what_comes_later_has_its_headroom() -> None:
    plan = plan_memory(WEIGHTS, replace(REQUEST, headroom_bytes=4 * GIB))
    assert plan.kv_cache == plan_memory(WEIGHTS, REQUEST).kv_cache - 4 * GIB
    assert "headroom 4.0 GiB" in str(plan)
    with pytest.raises(ConfigError, match=r"a smaller --headroom \(now 30\.0 GiB\)"):
        plan_memory(WEIGHTS, replace(REQUEST, headroom_bytes=30 * GIB))


def test_too_old() -> None:
    old = replace(H100, name="Tesla V100", capability=(7, 0))
    with pytest.raises(ConfigError, match=r"Tesla V100 has compute capability 7\.0 .* --device cpu"):
        plan_memory(WEIGHTS, replace(REQUEST, facts=old))


def test_planned_for_a_larger_device() -> None:
    small = DeviceFacts("NVIDIA A10", (8, 6), 24 * GIB, 23 * GIB)
    with pytest.raises(BundleError, match=r"planned for a larger device.*NVIDIA A10.*--memory.*--base int4"):
        plan_memory(WEIGHTS, replace(REQUEST, facts=small))


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"kv_bytes": 40 * GIB}, r"smaller --kv-cache \(up to 1\d\.\d GiB\)"),
        ({"kv_minimum": 40 * GIB}, "smaller --max-model-len"),
        ({"expert_cache_bytes": 30 * GIB}, r"smaller --expert-cache \(now 30\.0 GiB\)"),
        ({"expert_cache_bytes": 30 * GIB}, "fewer --slots"),
        ({"expert_cache_bytes": 30 * GIB}, "smaller --memory or a quantised base"),
    ],
)
def test_too_small_says_what_to_change(change: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        plan_memory(WEIGHTS, replace(REQUEST, **change))


def test_advice_helps() -> None:
    """The size that the message names is accepted."""
    request = replace(REQUEST, kv_bytes=40 * GIB)
    fitting = plan_memory(WEIGHTS, REQUEST).kv_cache
    with pytest.raises(ConfigError, match=f"up to {fitting / GIB:.1f} GiB"):
        plan_memory(WEIGHTS, request)
    assert plan_memory(WEIGHTS, replace(request, kv_bytes=fitting)).kv_cache == fitting


def test_taken_by_another_process() -> None:
    taken = replace(H100, free_bytes=20 * GIB)
    with pytest.raises(ConfigError, match=r"60\.0 GiB of NVIDIA H100 .* another process.*nvidia-smi"):
        plan_memory(WEIGHTS, replace(REQUEST, facts=taken))
    # A process that leaves enough is nobody's business.
    assert plan_memory(WEIGHTS, replace(REQUEST, facts=replace(H100, free_bytes=72 * GIB))).kv_cache > 4 * GIB


def test_workspace_grows_with_the_step() -> None:
    sizes = {"seqs": 64, "hidden": 4096, "expert_width": 14336, "top_k": 2, "vocabulary": 32000, "itemsize": 2}
    small, large = (workspace_bytes(tokens=tokens, **sizes) for tokens in (2048, 8192))
    # Of 8,192 tokens the sorted rows' gate and up alone are 8192 · 2 · 2 · 14336 values.
    assert large > 8192 * 2 * 2 * 14336 * 2
    assert small < large


@pytest.mark.parametrize(
    ("cuda", "available", "advice"),
    [
        (None, False, "built without CUDA; install a CUDA build .* --device cpu"),
        ("13.0", False, "finds no CUDA device; see whether nvidia-smi .* CUDA 13.0 .* --device cpu"),
        ("13.0", True, "Triton is not installed .* pip install triton"),
    ],
)
def test_torch_that_cannot_use_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, available: bool, advice: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=advice):
        choose_device("cuda")


def test_a_torch_for_other_gpus_means_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for AMD's GPUs says that CUDA is available; the kernels hold PTX."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ReferenceFamily:
    return ReferenceFamily("mixtral", tmp_path_factory.mktemp("mixtral"))


def engine(family: ReferenceFamily, facts: DeviceFacts, **options: object) -> EngineCore:
    settings = {"device": "cpu", "dtype": "float32", "block_size": 4, **options}
    return EngineCore(EngineConfig(bundle=str(family.bundle), **settings), facts=facts)  # type: ignore[arg-type]


def test_engine_asks_the_plan(family: ReferenceFamily) -> None:
    core = engine(family, H100, max_num_seqs=2)
    plan = core.memory_plan
    assert plan is not None
    held = core.model.resident_bytes
    assert (plan.weights.resident_experts, plan.weights.tables) == (held["resident_experts"], held["tables"])
    assert plan.weights.nonexperts_own == held["nonexperts_own"]
    assert plan.weights.nonexperts_shared == held["nonexperts_shared"]
    assert plan.kv_cache == held["kv_cache"]  # two sequences of full length are all that is of use
    fewer = engine(family, H100, max_num_seqs=2, slots=1).memory_plan
    assert fewer is not None
    assert fewer.weights.nonexperts_own < plan.weights.nonexperts_own


def test_engine_refuses_before_it_allocates(family: ReferenceFamily) -> None:
    tiny = DeviceFacts("GPU", (9, 0), GIB, GIB)
    with pytest.raises(BundleError, match="planned for a larger device"):
        engine(family, tiny)
    with pytest.raises(ConfigError, match=r"another process|too small"):
        engine(family, replace(H100, free_bytes=GIB))


def test_memory_taken_while_weights_are_loaded(family: ReferenceFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_staging: Staging, _target: torch.Tensor, _source: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Staging, "copy", full)
    with pytest.raises(ConfigError, match=r"taken by another process while .* --device cuda:N\. Planned: experts"):
        engine(family, H100)
