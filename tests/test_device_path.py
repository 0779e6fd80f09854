"""A GPU's path on a CPU: device tensors in place of Python numbers, static padded decode steps, gated slots.

The kernels are Triton's, run by its interpreter, or (much faster) their references in torch. Either way the tokens,
log-probabilities and logits must be those of `test_exactness.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's kernels need Triton")

from families import ARCHITECTURES
from polymoe import LLM, SamplingParams
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.model.backends.cuda import CudaBackend
from polymoe.model.experts.tier_cost import TierCosts
from polymoe.model.graphs.warm_up import prompt_lengths, warm_up
from polymoe.protocol.request import EngineRequest, SequenceId
from recorded_graph import NoWaiting, RecordedGraph
from references import ReferenceFamily, served_logits
from test_exactness import LOGITS_TOLERANCE, check


class DeviceLLM(LLM):
    """An `LLM` on the CPU whose engine takes a GPU's path."""

    def __init__(self, bundle: Path, reference: bool = True, **options: Any) -> None:
        settings = {"dtype": "float32", "device": "cpu", "block_size": 4, "kv_cache_bytes": 1 << 24, **options}
        self._serve(EngineCore(EngineConfig(bundle=str(bundle), **settings), backend=CudaBackend(reference)))


# What differs where this path does: shared experts, sinks and windows, two kinds of heads; the others are slow.
_FAST = ("mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(arch, marks=[] if arch in _FAST else [pytest.mark.slow]) for arch in ARCHITECTURES],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceFamily:
    return ReferenceFamily(request.param, tmp_path_factory.mktemp(request.param), num_requests=6)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_mixed_batch_in_padded_decode_steps(family: ReferenceFamily, asynchronous: bool) -> None:
    llm = DeviceLLM(family.bundle, async_scheduling=asynchronous)
    assert (llm.engine.runner.graphs is None) == llm.engine.model.runs_per_variant
    check(llm, family, repeat=2)


def test_logits_in_one_mixed_pass(family: ReferenceFamily) -> None:
    llm = DeviceLLM(family.bundle)
    for case, served in zip(family.cases, served_logits(llm.engine, family.cases), strict=True):
        torch.testing.assert_close(served, case.logits, atol=LOGITS_TOLERANCE, rtol=0)


def test_preemption(family: ReferenceFamily) -> None:
    check(DeviceLLM(family.bundle, num_kv_blocks=16, max_model_len=48, max_num_batched_tokens=5), family)


def record(llm: LLM) -> None:
    """Let the engine replay its decode steps, as recorded of one variant, and compute none."""
    graphs, backend = llm.engine.runner.graphs, llm.engine.model.context.backend
    if llm.engine.model.runs_per_variant:  # whose steps are not captured
        assert graphs is None
        return
    assert graphs is not None
    assert backend.pads_steps
    with torch.inference_mode():
        for size in graphs.sizes:
            graphs.batch.fill(graphs._dummy(size), size)
            with RecordedGraph(backend) as graph:
                logits = graphs._compute(size)
            graphs._captured[size] = graph, logits  # type: ignore[assignment]
    graphs._compute = None  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(("slots", "prefetch"), [(1, True), (2, False), (3, False)])
def test_a_captured_step_is_valid_for_every_mix(family: ReferenceFamily, slots: int, prefetch: bool) -> None:
    """Every decode step replays what was recorded of one variant, while that was in a slot."""
    llm = DeviceLLM(family.bundle, slots=slots, prefetch=prefetch, max_num_seqs=8, max_model_len=48)
    if family.arch != "gpt_oss":  # its experts have no kernel, so its steps are computed, in the same padded batches
        record(llm)
    check(llm, family, repeat=2)
    assert (llm.engine.stats().reconfigurations > 0) == (slots < 3)


@pytest.mark.parametrize(("slots", "prefetch", "asynchronous"), [(1, True, False), (1, True, True), (2, False, False)])
def test_fewer_slots_than_variants(family: ReferenceFamily, slots: int, prefetch: bool, asynchronous: bool) -> None:
    options: dict[str, Any] = {"num_kv_blocks": 20, "max_model_len": 48, "async_scheduling": asynchronous}
    llm = DeviceLLM(family.bundle, slots=slots, prefetch=prefetch, **options)
    assert llm.engine.model.slots.groups is not None  # pipelined: layers wait for their own tensors
    check(llm, family)
    assert llm.engine.stats().reconfigurations > 0


@pytest.mark.parametrize("cache", [0, 100_000, 1 << 24])
def test_absent_experts_are_read_where_they_are(family: ReferenceFamily, tmp_path: Path, cache: int) -> None:
    """Decode steps are captured all the same; rows on the device change hands between them."""
    llm = DeviceLLM(family.write(tmp_path / "bundle", capacity=3), expert_cache_bytes=cache, max_num_seqs=4)
    mapped = llm.engine.model.pool.mapped
    if family.arch == "gpt_oss":
        assert mapped is None, "its experts have no kernel"
        return
    assert mapped is not None
    record(llm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polymoe.model.experts.mapped._PERIOD", 2)
        check(llm, family, repeat=3)
    stats = llm.engine.stats()
    rows = sum(layer.num_rows for layer in mapped.layers.values())
    assert (stats.expert_misses > 0, stats.expert_hits > 0, rows > 0) == (True, cache > 0, cache > 0)
    assert stats.resident_bytes["expert_cache"] <= cache
    assert stats.resident_bytes["host_pinned"] == sum(
        t.nbytes for layer in mapped.layers.values() for t in layer.host.values()
    )
    assert mapped.counted_steps > 0
    mapped.check_integrity()


def test_absent_experts_that_decode_waits_for(family: ReferenceFamily, tmp_path: Path) -> None:
    """Where the host cannot pin them."""
    bundle = family.write(tmp_path / "bundle", capacity=3)
    with pytest.MonkeyPatch.context() as patch:
        if family.arch != "gpt_oss":
            patch.setattr("polymoe.model.experts.mapped.available_memory", lambda: 1000)
            with pytest.warns(UserWarning, match=r"do not fit into the 1000 B .* plan with more --memory"):
                llm = DeviceLLM(bundle, expert_cache_bytes=20_000)
        else:
            llm = DeviceLLM(bundle, expert_cache_bytes=20_000)
    assert llm.engine.runner.graphs is None  # the host must learn which experts to fetch
    check(llm, family)
    assert llm.engine.stats().expert_misses > 0


def test_absent_experts_computed_on_the_host(tmp_path: Path) -> None:
    """With a bus so slow that nothing is worth fetching, no expert crosses it and the tokens are the same."""
    family = ReferenceFamily("mixtral", tmp_path, num_requests=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polymoe.model.experts.pool.map_experts", lambda *_: None)
        llm = DeviceLLM(family.write(tmp_path / "absent", capacity=3), expert_cache_bytes=20_000)
    slow_bus = TierCosts(1.0, 0.0, host_bytes_per_s=1e9, host_flops=1e12, exchange_s=0.0, mapped_bytes_per_s=1.0)
    llm.engine.model.pool.cache.costs = slow_bus
    check(llm, family)
    expected = llm.engine.stats().expert_misses
    llm.engine.model.pool.cache.costs = None
    check(llm, family)
    assert llm.engine.stats().expert_misses > expected


@pytest.mark.parametrize(
    "arch",
    ["mixtral", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("qwen3_moe", "deepseek_v3"))],
)
def test_kernels_themselves(arch: str, tmp_path: Path) -> None:
    """Few tokens, since the interpreter takes its time: a mixed batch of prompts in chunks and of padded decodes."""
    family, at_once = ReferenceFamily(arch, tmp_path, num_requests=3), 16
    if arch == "mixtral":
        at_once = 5
        family.cases = [family.case("base", [7, 5, 9, 30, 8, 3], 3), family.case("v1", [4, 5, 6], 5)]
    check(DeviceLLM(family.bundle, reference=False, max_num_batched_tokens=at_once, max_num_seqs=3), family)


def test_padding_changes_nothing_and_writes_nowhere(tmp_path: Path) -> None:
    """Three sequences run as four rows; the cache's real blocks hold the same as without padding, bit for bit."""
    family = ReferenceFamily("mixtral", tmp_path, num_requests=3)
    caches = []
    for max_num_seqs in (3, 8):  # a ladder that ends at 3, and one with 4 after 2
        llm = DeviceLLM(family.bundle, max_num_seqs=max_num_seqs, num_kv_blocks=40, max_model_len=48)
        graphs = llm.engine.runner.graphs
        assert graphs is not None
        assert (3 in graphs.sizes) == (max_num_seqs == 3)
        check(llm, family)
        cache = llm.engine.model.kv_cache
        caches.append([t[: cache.num_blocks] for side in (cache.key, cache.value) for t in side.values()])
    for plain, padded in zip(*caches, strict=True):
        torch.testing.assert_close(plain, padded, atol=1e-5, rtol=0)


def test_warm_up_leaves_no_trace(tmp_path: Path) -> None:
    assert prompt_lengths(100) == [16, 32, 64, 100]
    assert prompt_lengths(8) == [8]
    family = ReferenceFamily("mixtral", tmp_path, num_requests=3)
    llm = DeviceLLM(family.bundle, slots=1, max_model_len=48)
    done: list[float] = []
    warm_up(llm.engine.model, prompt_lengths(40), done.append)
    assert done[-1] == 1.0
    cache = llm.engine.model.kv_cache
    assert not any(t[: cache.num_blocks].any() for side in (cache.key, cache.value) for t in side.values())
    check(llm, family)


def test_no_operation_of_a_captured_step_waits_for_the_device(tmp_path: Path) -> None:
    family = ReferenceFamily("qwen3_moe", tmp_path, num_requests=3)
    llm = DeviceLLM(family.bundle, reference=False, max_num_seqs=4)
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    graphs.batch.fill(graphs._dummy(4), 4)
    graphs._compute(4)
    with NoWaiting() as mode:
        graphs._compute(4)
    assert any("index" in name for name in mode.names)  # it saw the step's operations


def test_the_host_waits_for_nothing_but_tokens(tmp_path: Path) -> None:
    """Whole engine steps, with all that requests can ask of the sampler."""
    family = ReferenceFamily("mixtral", tmp_path, num_requests=3)
    engine = DeviceLLM(family.bundle, async_scheduling=True).engine
    asked: list[dict[str, Any]] = [
        {"temperature": 0, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "logprobs": 2},
        {"top_p": 0.9, "top_k": 7, "min_p": 0.01, "seed": 3, "logit_bias": {5: 1.0}},
        {"temperature": 0.5, "min_tokens": 8},
    ]
    for index, options in enumerate(asked):
        sampling = SamplingParams(max_tokens=12, **options)
        engine.add_request(
            EngineRequest(
                request_id=SequenceId(str(index)),
                variant=index,
                prompt_token_ids=[4, 5, 6],
                sampling=sampling,
                stop_token_ids=[1],
            )
        )
    counts = [len(engine.step()) for _ in range(4)]
    assert counts[-1] == len(asked)
    with NoWaiting() as mode:
        assert all(len(engine.step()) == len(asked) for _ in range(2))
    assert any("index_copy" in name for name in mode.names)  # a token went from step to step on the device
