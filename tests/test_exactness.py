"""The backbone: a lossless plan gives every variant exactly its own model, in any mixture and on any path.

Each architecture is a tiny random family, some stored in few bits; the reference is each variant alone in
transformers' `generate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from families import ARCHITECTURES, STORED
from polymoe import LLM, RequestOutput, SamplingParams
from references import ReferenceFamily, served_logits

LOGITS_TOLERANCE = 1e-4
FAMILIES = [*ARCHITECTURES, *STORED, "switch_transformers"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every family on every device that serves it: encoder–decoder models are served on a CPU only."""
    if "device" not in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES, indirect=True)
        return
    pairs: list[Any] = [(arch, "cpu") for arch in FAMILIES]
    pairs += [pytest.param(arch, "cuda", marks=[pytest.mark.gpu, NO_GPU]) for arch in ARCHITECTURES]
    metafunc.parametrize(("family", "device"), pairs, indirect=["family"], scope="module")


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceFamily:
    return ReferenceFamily(request.param, tmp_path_factory.mktemp(request.param))


def load(bundle: Path, **options: Any) -> LLM:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4, "kv_cache_bytes": 1 << 24}
    if options.get("device") == "cuda":
        settings["max_num_seqs"] = 8  # each batch size of decode is compiled and captured at the start
    return LLM(bundle, **(settings | options))


def check(llm: LLM, family: ReferenceFamily, repeat: int = 1) -> list[RequestOutput]:
    """Run all cases at once; every token must be the reference's. Returns the outputs of the last run."""
    cases = family.cases
    params = [SamplingParams(temperature=0, max_tokens=c.max_tokens, ignore_eos=True, logprobs=0) for c in cases]
    for _ in range(repeat):
        outputs = llm.generate([c.prompt for c in cases], params, variants=[c.variant for c in cases])
        for case, output in zip(cases, outputs, strict=True):
            completion = output.outputs[0]
            assert completion.token_ids == case.tokens, f"{case.variant} with a prompt of {len(case.prompt)}"
            expected = torch.log_softmax(case.logits, dim=-1)
            assert completion.logprobs is not None
            for step, (token, entry) in enumerate(zip(case.tokens, completion.logprobs, strict=True)):
                assert entry[token].logprob == pytest.approx(expected[step, token].item(), abs=LOGITS_TOLERANCE)
        llm.engine.check_integrity()
        assert llm.engine.blocks.usage == 0
    return outputs


def test_logits_in_one_mixed_pass(family: ReferenceFamily, device: str) -> None:
    llm = load(family.bundle, device=device)
    for case, served in zip(family.cases, served_logits(llm.engine, family.cases), strict=True):
        torch.testing.assert_close(served, case.logits, atol=LOGITS_TOLERANCE, rtol=0)


def test_mixed_batch_and_prefix_hits(family: ReferenceFamily, device: str) -> None:
    outputs = check(load(family.bundle, device=device), family, repeat=2)
    assert any(output.num_cached_tokens > 0 for output in outputs) == family.reuses_prefixes


def test_chunked_prefill(family: ReferenceFamily, device: str) -> None:
    check(load(family.bundle, device=device, max_num_batched_tokens=5, enable_prefix_caching=False), family)


def test_preemption(family: ReferenceFamily, device: str) -> None:
    llm = load(family.bundle, device=device, num_kv_blocks=16, max_model_len=48)
    check(llm, family, repeat=2)
    assert sum(llm.engine.stats().preemptions) > 0


# Families that differ in how a step is prepared take all of the ways below, each other family the next one of each
# kind; with `make test-slow` all take all.
IN_ALL_WAYS = ("mixtral", "gpt_oss", "qwen3_5_moe_text", "deepseek_v32", "switch_transformers")
SLOTS = ((1, False), (1, True), (2, False))  # (slots, prefetch)
AHEAD: tuple[dict[str, int], ...] = (
    {}, {"max_num_batched_tokens": 5}, {"num_kv_blocks": 16}, {"slots": 1, "num_kv_blocks": 20},
)  # fmt: skip
CACHES = (0, 20_000, 1 << 24)  # bytes
Way = TypeVar("Way")


def ways_of(family: ReferenceFamily, ways: Sequence[Way]) -> Sequence[Way]:
    return ways if family.arch in IN_ALL_WAYS else [ways[FAMILIES.index(family.arch) % len(ways)]]


def test_fewer_slots_than_variants(family: ReferenceFamily, device: str) -> None:
    for slots, prefetch in ways_of(family, SLOTS):
        check_slots(family, device, slots, prefetch)


def check_slots(family: ReferenceFamily, device: str, slots: int, prefetch: bool) -> None:
    llm = load(family.bundle, device=device, slots=slots, prefetch=prefetch, num_kv_blocks=20, max_model_len=48)
    check(llm, family)
    stats = llm.engine.stats()
    assert stats.reconfigurations > 0
    assert stats.reconfiguration_bytes > 0


def test_a_step_launched_before_the_last_ones_tokens_are_known(family: ReferenceFamily) -> None:
    """On a GPU all steps are, so the other tests see to it there."""
    for options in ways_of(family, AHEAD):
        check_ahead(family, options)


def check_ahead(family: ReferenceFamily, options: dict[str, int]) -> None:
    llm = load(family.bundle, max_model_len=48, async_scheduling=True, **options)
    check(llm, family, repeat=2)
    assert sum(llm.engine.stats().preemptions) > 0 or options.get("num_kv_blocks") != 16


def test_absent_experts(family: ReferenceFamily, device: str, tmp_path: Path) -> None:
    bundle = family.write(tmp_path / "bundle", capacity=3)
    for cache in ways_of(family, CACHES):
        check_absent(family, device, bundle, cache)


def check_absent(family: ReferenceFamily, device: str, bundle: Path, cache: int) -> None:
    llm = load(bundle, device=device, expert_cache_bytes=cache)
    check(llm, family)
    stats = llm.engine.stats()
    assert llm.engine.info.experts_absent > 0
    assert stats.expert_misses > 0
    if cache == 0:
        assert stats.expert_hits == 0
    elif cache >= 1 << 24 and llm.engine.model.pool.mapped is None:
        # A cache that holds everything fetches each expert once; where decode reads over the bus, experts move later.
        assert stats.expert_hits > stats.expert_misses
    assert stats.resident_bytes["expert_cache"] <= cache


@pytest.mark.slow
def test_all_ways(family: ReferenceFamily, tmp_path: Path) -> None:
    bundle = family.write(tmp_path / "bundle", capacity=3)
    for slots, prefetch in SLOTS:
        check_slots(family, "cpu", slots, prefetch)
    for options in AHEAD:
        check_ahead(family, options)
    for cache in CACHES:
        check_absent(family, "cpu", bundle, cache)
