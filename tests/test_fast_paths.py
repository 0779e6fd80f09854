"""What a model's operations run on is decided when it is loaded, said, and true: no fast path says no in silence."""

import os
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from families import ARCHITECTURES, make_family
from polymoe.console import Console
from polymoe.engine.core import EngineCore
from polymoe.model.backends.reference import ReferenceBackend
from polymoe.model.backends.routed_experts import StoredExperts
from polymoe.model.stock.skeleton import expert_modules
from polymoe.native.library import cpu_kernels
from polymoe.offline.api import make_plan
from polymoe.protocol.fast_path import FastPath, merged
from polymoe.server.settings import ServerSettings
from polymoe.server.summary import print_summary
from servers import ThreadServer, engine_config, make_bundle
from zygote import run_python

NEEDS_KERNELS = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or not for this CPU")
VARIANTS = 2


def bundle_of(arch: str, folder: Path, policy: str = "auto", memory: str | None = "1.0x", **overrides: Any) -> Path:
    paths = make_family(arch, folder / "checkpoints", num_variants=VARIANTS, **overrides)
    make_plan(paths, policy, memory, folder / "bundle")
    return folder / "bundle"


def logits(engine: EngineCore) -> torch.Tensor:
    """Of a pass that mixes variants and lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (1, 17, 5)]
    return torch.cat(engine.prompt_logits([(i % VARIANTS, prompt) for i, prompt in enumerate(prompts)]))


def paths_of(engine: EngineCore, part: str) -> list[FastPath]:
    return [path for path in engine.info.fast_paths if path.part == part]


@NEEDS_KERNELS
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_experts_of_every_architecture_are_compiled(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 of 49 architectures fell to torch for their routers' dtype, and nobody saw it: every figure was of Mixtral."""
    bundle = bundle_of(arch, tmp_path)
    engines = {d: EngineCore(engine_config(bundle, dtype=d, max_model_len=64)) for d in ("float32", "bfloat16")}
    for engine in engines.values():
        assert {path.runs_on for path in paths_of(engine, "experts")} == {"compiled packed"}
        assert not any(path.slow for path in engine.info.fast_paths)
    found = {dtype: logits(engine) for dtype, engine in engines.items()}
    assert not used_torch(engines["bfloat16"], monkeypatch)
    for engine in engines.values():
        by_torch(engine)
    expected = {dtype: logits(engine) for dtype, engine in engines.items()}
    torch.testing.assert_close(found["float32"], expected["float32"], atol=1e-4, rtol=0)
    away = (found["bfloat16"] - expected["bfloat16"]).norm() / expected["bfloat16"].norm()
    assert away < 0.1  # routing may turn where two experts are nearly equal


def by_torch(engine: EngineCore) -> None:
    """Let torch compute the experts from now on."""
    modules = expert_modules(engine.model.model)
    for layer, (_, module) in zip(engine.model.pool.layers, modules, strict=True):
        layer.prepare(module, ReferenceBackend())


def used_torch(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a pass multiplies packed experts by torch."""
    used = False

    def note(*_: object) -> torch.Tensor:
        nonlocal used
        used = True
        raise AssertionError("packed experts by torch")

    with monkeypatch.context() as patched:
        patched.setattr("polymoe.kernels.cpu.packed_pool.decode", note)
        logits(engine)
    return used


@NEEDS_KERNELS
def test_stored_experts_beside_absent_ones_stay_compiled(tmp_path: Path) -> None:
    """One absent expert in a step sent the whole layer to torch, one expert at a time."""
    bundle = bundle_of("mixtral", tmp_path, "separate", "1.0x", hidden_size=64, intermediate_size=32)
    engine = EngineCore(engine_config(bundle, dtype="bfloat16", max_model_len=64, expert_cache_bytes=0))
    assert {path.runs_on for path in paths_of(engine, "experts")} == {"compiled stored"}
    (absent,) = paths_of(engine, "absent experts")
    assert (absent.runs_on, absent.count) == ("torch", 2)
    found = logits(engine)
    for layer in engine.model.pool.layers:
        assert isinstance(layer.compute, StoredExperts)
        assert layer.compute.beside_absent is not None
    by_torch(engine)
    expected = logits(engine)
    assert (found - expected).norm() < 0.1 * expected.norm()


@NEEDS_KERNELS
def test_experts_that_are_stored_the_other_way_round_are_turned_over(tmp_path: Path) -> None:
    """gpt-oss and Aria hold `[in, out]`: stored experts of theirs were multiplied one by one."""
    bundle = bundle_of("gpt_oss", tmp_path, "separate", None, hidden_size=64, intermediate_size=32)
    engine = EngineCore(engine_config(bundle, dtype="bfloat16", max_model_len=64))
    assert {path.runs_on for path in paths_of(engine, "experts")} == {"compiled stored"}
    for layer in engine.model.pool.layers:
        assert layer.resident["gate_up_proj"].shape[1:] == (64, 64)
        assert layer.resident["down_proj"].shape[1:] == (64, 32)
    (path,) = paths_of(engine, "attention")
    assert str(path) == "3 on torch (heads of 16 and 16 values, no multiples of 32 and 16)"


def test_attention_with_sinks_is_said_to_be_torchs(tmp_path: Path) -> None:
    bundle = bundle_of("gpt_oss", tmp_path, "separate", None, head_dim=32)
    engine = EngineCore(engine_config(bundle, dtype="bfloat16", max_model_len=64))
    (path,) = paths_of(engine, "attention")
    assert path.runs_on == "torch"
    if cpu_kernels() is not None:
        assert path.reason == "sinks"


def test_without_kernels_it_says_so(tmp_path: Path) -> None:
    """In a process of its own: whether there are kernels is decided once."""
    bundle = bundle_of("mixtral", tmp_path)
    code = (
        "import sys; from polymoe import LLM; llm = LLM(sys.argv[1], dtype='bfloat16', device='cpu', "
        "kv_cache_bytes=1 << 24); print(*(p for p in llm.engine.info.fast_paths if p.part == 'experts'))"
    )
    done = run_python(code, str(bundle), env={**os.environ, "POLYMOE_NO_KERNELS": "1"})
    assert done.stdout.strip() == "2 on torch packed (POLYMOE_NO_KERNELS turns the CPU kernels off)"
    assert "the experts of 2 layers run on torch packed, more than twice as slow: POLYMOE_NO_KERNELS" in done.stderr


def test_operators_and_clients_are_told(tmp_path: Path) -> None:
    with ThreadServer(engine_config(make_bundle(tmp_path), dtype="float32")) as server:
        card = httpx.get(f"{server.url}/v1/models/base").json()
        shown = httpx.get(f"{server.url}/metrics").text
        out = StringIO()
        print_summary(Console(file=out, width=80), server.client, "127.0.0.1", server.port, ServerSettings())
    (experts,) = [path for path in card["fast_paths"] if path["part"] == "experts"]
    assert experts == {
        "part": "experts", "runs_on": "torch stored", "count": 2, "reason": "float32, which torch multiplies",
        "slow": False,
    }  # fmt: skip
    labels = 'part="experts",reason="float32, which torch multiplies",runs_on="torch stored",slow="false"'
    assert f"polymoe:fast_paths{{{labels}}} 2.0" in shown
    assert "runs on   experts: 2 on torch stored (float32, which torch multiplies)" in out.getvalue()
    assert "warning" not in out.getvalue()


def test_paths_that_say_the_same_are_one() -> None:
    def path(reason: str, count: int = 1) -> FastPath:
        return FastPath(part="norm", runs_on="torch", count=count, reason=reason)

    assert merged([path("a"), path("b"), path("a", 3)]) == [path("a", 4), path("b")]
