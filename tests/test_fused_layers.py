"""Attention layers, routers and experts in one call each, against the stock modules that they stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from families import make_config, make_family
from polymoe.engine.core import EngineCore
from polymoe.kernels.cpu.router import Scoring, choose, fast_router, why_not_fast_router
from polymoe.kernels.cpu.tiles import ACTIVATIONS
from polymoe.model.backends.base import AttentionParts
from polymoe.model.backends.cpu import CpuBackend
from polymoe.model.stock.fused_attention import FusedAttention, fuse_attention
from polymoe.model.stock.fused_router import FusedRouter, fuse_routers
from polymoe.native.library import cpu_kernels
from polymoe.offline.api import make_plan
from polymoe.protocol.request import EngineRequest, SequenceId, TokenSampling
from servers import engine_config

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or cannot run here")

WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WIDE |= {"intermediate_size": 64, "moe_intermediate_size": 32}


class Apart(CpuBackend):
    """Has no kernel for whole layers."""

    def prepare_attention(self, _parts: AttentionParts) -> None:
        return None

    def why_not_route(self, _dtype: torch.dtype, _width: int) -> str:
        return "a test"

    def _in_one_call(self, *_: Any) -> None:
        return None


def engine_of(bundle: Path, backend: CpuBackend) -> EngineCore:
    return EngineCore(engine_config(bundle, dtype="bfloat16", max_model_len=64), backend=backend)


def logits(engine: EngineCore) -> torch.Tensor:
    """Of a pass that mixes variants and lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (1, 17, 5, 30)]
    return torch.cat(engine.prompt_logits([((2 * i) % 3, prompt) for i, prompt in enumerate(prompts)]))


def generated(engine: EngineCore) -> dict[str, list[int]]:
    """Greedy tokens of requests that come one after the other, some of one variant."""
    found: dict[str, list[int]] = {}
    for step in range(40):
        if step < 12 and step % 2 == 0:
            prompt = [3 + (7 * step + i) % 90 for i in range(1 + 3 * step)]
            sampling = TokenSampling(max_tokens=8, temperature=0.0)
            variant, name = [0, 2, 2, 1][step % 4], SequenceId(f"r{step}", 0)
            engine.add_request(
                EngineRequest(request_id=name, variant=variant, prompt_token_ids=prompt, sampling=sampling)
            )
        for output in engine.step():
            found.setdefault(str(output.request_id), []).extend(output.new_token_ids)
    assert not engine.has_work()
    return found


def count(engine: EngineCore, kind: type) -> int:
    return sum(isinstance(module.forward, kind) for module in engine.model.model.modules())


@pytest.mark.parametrize(
    ("arch", "memory", "overrides", "frozen"),
    [
        ("mixtral", None, {}, None),
        ("mixtral", "0.6x", {"sliding_window": 8}, None),
        ("mixtral", "1.0x-all", {}, None),
        ("qwen3_moe", None, {}, r"k_proj|q_norm|layers\.1\.self_attn"),
        ("qwen2_moe", None, {}, None),
    ],
    ids=["stored", "packed, a window", "all packed", "norms of heads, some parts shared", "biases"],
)
def test_whole_layers_compute_what_their_operations_do(
    arch: str, memory: str | None, overrides: dict[str, Any], frozen: str | None, tmp_path: Path
) -> None:
    paths = make_family(arch, tmp_path / "checkpoints", frozen=frozen, dtype=torch.bfloat16, **(WIDE | overrides))
    make_plan(paths, "auto" if memory else "separate", memory, tmp_path / "bundle")
    whole, apart = (engine_of(tmp_path / "bundle", kind(torch.bfloat16)) for kind in (CpuBackend, Apart))
    assert count(whole, FusedAttention) == len(whole.model.attention_layers)
    assert count(whole, FusedRouter) == len(whole.model.pool.layers)
    assert count(apart, FusedAttention) == count(apart, FusedRouter) == 0
    assert all(layer.compute.direct is not None for layer in whole.model.pool.layers)  # type: ignore[attr-defined]
    found, want = logits(whole), logits(apart)
    # Torch multiplies by what is the same in all variants, and adds biases after rounding: routing may turn where two
    # experts are nearly equal.
    exact = frozen is None and arch != "qwen2_moe"
    assert (found - want).norm() < 0.1 * want.norm()
    if exact:
        assert torch.equal(found, want)
        assert generated(whole) == generated(apart)
    whole.check_integrity()


@pytest.mark.parametrize("counts", [[9, 0, 0], [1, 0, 30], [1, 1, 1]])
@pytest.mark.parametrize(
    ("top_k", "scoring"), [(1, Scoring.OF_ALL), (2, Scoring.NORMALISED), (8, Scoring.OF_ALL), (3, Scoring.OF_CHOSEN)]
)
def test_the_router_matches_the_formula(counts: list[int], top_k: int, scoring: Scoring) -> None:
    generator = torch.Generator().manual_seed(top_k)
    stack = torch.randn(3, 8, 64, generator=generator).bfloat16()
    x = (torch.randn(sum(counts), 64, generator=generator) / 8).bfloat16()
    starts = torch.tensor([0, counts[0], counts[0] + counts[1], sum(counts)])
    logits, scores, chosen = fast_router(x, stack, torch.tensor([2, 0, 1]), starts, top_k, scoring)
    own = torch.repeat_interleave(torch.tensor([2, 0, 1]), torch.tensor(counts))
    want = torch.einsum("th,teh->te", x.float(), stack[own].float())
    torch.testing.assert_close(logits.float(), want, atol=1e-2, rtol=2**-7)
    _, best, _ = choose(logits, top_k, scoring)
    torch.testing.assert_close(scores, best, atol=1e-6, rtol=1e-5)
    picked = torch.softmax(logits.float(), dim=-1).gather(1, chosen)
    torch.testing.assert_close(
        picked if scoring == Scoring.OF_ALL else picked / picked.sum(1, keepdim=True), scores, atol=1e-6, rtol=1e-5
    )
    assert all(len(set(row)) == top_k for row in chosen.tolist())


def test_equal_scores_go_to_the_first_expert() -> None:
    stack = torch.ones(1, 4, 32).bfloat16()
    x = torch.ones(2, 32).bfloat16()
    _, scores, chosen = fast_router(x, stack, torch.tensor([0]), torch.tensor([0, 2]), 2, Scoring.OF_ALL)
    assert chosen.tolist() == [[0, 1], [0, 1]]
    assert scores.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert why_not_fast_router(torch.bfloat16, 40)
    assert why_not_fast_router(torch.float32, 64)


def test_routers_are_told_apart_by_what_they_compute() -> None:
    class Sigmoid(MixtralTopKRouter):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> Any:
            logits, scores, chosen = super().forward(hidden_states)
            return logits, scores.sigmoid(), chosen

    config = make_config("mixtral", **WIDE)
    plain, other = (kind(config).to(torch.bfloat16) for kind in (MixtralTopKRouter, Sigmoid))
    qwen = Qwen3MoeTopKRouter(make_config("qwen3_moe", norm_topk_prob=False, **WIDE)).to(torch.bfloat16)
    for router in (plain, qwen):
        torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 64).bfloat16()
    want = [router(x) for router in (plain, qwen)]
    assert fuse_routers(torch.nn.ModuleList([plain, other, qwen]), CpuBackend(torch.bfloat16)) == 2
    assert not isinstance(other.forward, FusedRouter)
    for router, (_, scores, _) in zip((plain, qwen), want, strict=True):
        found = router(x)[1]
        assert found.dtype == scores.dtype
        torch.testing.assert_close(found, scores, atol=2**-7, rtol=2**-7)


def test_another_rotary_embedding_is_left_to_the_stock_module() -> None:
    """Cohere turns neighbouring values, not halves."""
    config = CohereConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    config._attn_implementation = "polymoe"
    backend = CpuBackend(torch.bfloat16, ACTIVATIONS["int8"])
    assert fuse_attention([CohereAttention(config, 0).to(torch.bfloat16)], backend) == 0
