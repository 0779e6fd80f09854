"""Attention layers, routers and experts in one call each, against the stock modules that they stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralRotaryEmbedding,
    MixtralTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from families import make_config, make_family
from polymoe.engine.core import EngineCore
from polymoe.kernels.cpu.router import Scoring, choose, fast_router, why_not_fast_router
from polymoe.kernels.cpu.tiles import ACTIVATIONS
from polymoe.model.backends.base import AttentionParts
from polymoe.model.backends.cpu import CpuBackend
from polymoe.model.stock.fused_attention import FusedAttention, fuse_attention
from polymoe.model.stock.fused_decoder_layer import FusedDecoderLayer, fuse_decoder_layers
from polymoe.model.stock.fused_model import FusedModel, fuse_model
from polymoe.model.stock.fused_router import FusedRouter, fuse_routers
from polymoe.model.stock.turning import Turning
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


class Passes:
    """In the place of a model's `FusedModel`: counts the passes that it computes."""

    def __init__(self, fused: FusedModel) -> None:
        self.fused, self.count = fused, 0

    def __call__(self, *given: Any) -> torch.Tensor | None:
        found = self.fused(*given)
        self.count += found is not None
        return found


OLMOE = {"hidden_size": 128, "num_key_value_heads": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("arch", "memory", "overrides", "frozen", "fused"),
    [
        ("mixtral", None, {}, None, 2),
        ("mixtral", "0.6x", {"sliding_window": 8}, None, 2),
        ("mixtral", "1.0x-all", {}, None, 2),
        ("mixtral", None, {"rope_parameters": YARN}, None, 2),
        ("mixtral", None, {"rope_parameters": DYNAMIC}, None, 2),
        ("qwen3_moe", None, {}, r"k_proj|q_norm|layers\.1\.self_attn", 2),
        ("qwen3_moe", "0.6x", {"mlp_only_layers": [], "num_experts": 6}, None, 3),  # 8: two are equally good once
        ("granitemoe", None, {}, None, 2),
        ("granitemoe", "1.0x-all", {"tie_word_embeddings": True}, None, 2),
        ("olmoe", "0.6x", OLMOE, None, 2),
        ("olmoe", None, OLMOE | {"clip_qkv": 8.0}, None, 0),
        ("qwen2_moe", None, {}, None, 0),
    ],
    ids=["stored", "packed, a window", "all packed", "another rotary embedding", "one that follows the longest",
         "norms of heads, some parts shared, a dense layer", "packed norms of heads", "multipliers",
         "multipliers, all packed and tied", "norms of all heads", "clipped", "biases, shared experts"],
)  # fmt: skip
def test_whole_layers_compute_what_their_operations_do(
    arch: str, memory: str | None, overrides: dict[str, Any], frozen: str | None, fused: int, tmp_path: Path
) -> None:
    paths = make_family(arch, tmp_path / "checkpoints", frozen=frozen, dtype=torch.bfloat16, **(WIDE | overrides))
    make_plan(paths, "auto" if memory else "separate", memory, tmp_path / "bundle")
    whole, apart = (engine_of(tmp_path / "bundle", kind(torch.bfloat16)) for kind in (CpuBackend, Apart))
    assert count(whole, FusedAttention) == (0 if "clip_qkv" in overrides else len(whole.model.attention_layers))
    assert count(whole, FusedRouter) == len(whole.model.pool.layers)
    assert count(whole, FusedDecoderLayer) == fused
    assert (whole.model.fused is not None) == (fused == whole.bundle.config.num_hidden_layers)
    assert apart.model.fused is None
    layers = [path for path in whole.info.fast_paths if path.part == "layer"]
    assert [path.count for path in layers if not path.reason] == ([fused] if fused else [])
    assert all(path.reason for path in layers if path.runs_on == "the stock module's operations")
    assert count(apart, FusedAttention) == count(apart, FusedRouter) == 0
    assert all(layer.compute.direct is not None for layer in whole.model.pool.layers)  # type: ignore[attr-defined]
    found, want = logits(whole), logits(apart)
    # Torch multiplies by what is the same in all variants, and adds biases after rounding: routing may turn where two
    # experts are nearly equal.
    exact = frozen is None and arch != "qwen2_moe"
    assert (found - want).norm() < 0.1 * want.norm()
    if exact:
        passes = whole.model.fused = None if whole.model.fused is None else Passes(whole.model.fused)  # type: ignore[assignment]
        assert torch.equal(logits(whole), want)
        assert generated(whole) == generated(apart)
        assert passes is None or passes.count > 15
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


def test_a_layer_that_does_something_else_is_left_to_the_stock_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of these differs from the formula in one place."""
    paths = make_family("mixtral", tmp_path / "checkpoints", dtype=torch.bfloat16, **WIDE)
    make_plan(paths, "separate", None, tmp_path / "bundle")
    stock = MixtralDecoderLayer.forward

    def fused_with(change: Any) -> tuple[int, bool]:
        with monkeypatch.context() as patch:
            patch.setattr(MixtralDecoderLayer, "forward", change)
            engine = engine_of(tmp_path / "bundle", CpuBackend(torch.bfloat16))
            return count(engine, FusedDecoderLayer), engine.model.fused is not None

    def doubled(self: Any, *given: Any, **named: Any) -> Any:
        return 2 * stock(self, *given, **named)

    def norm_twice(self: Any, hidden_states: torch.Tensor, *given: Any, **named: Any) -> Any:
        return stock(self, self.input_layernorm(hidden_states), *given, **named)

    def added(self: Any, hidden_states: torch.Tensor, *given: Any, **named: Any) -> Any:
        return stock(self, hidden_states, *given, **named) + hidden_states

    assert fused_with(stock) == (2, True)
    assert [fused_with(change) for change in (doubled, norm_twice, added)] == [(0, False)] * 3


def test_a_model_that_does_something_between_layers_is_left_to_the_stock_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints", dtype=torch.bfloat16, **WIDE)
    make_plan(paths, "separate", None, tmp_path / "bundle")
    stock = MixtralForCausalLM.forward

    def capped(self: Any, *given: Any, **named: Any) -> Any:
        output = stock(self, *given, **named)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(MixtralForCausalLM, "forward", capped)
    engine = engine_of(tmp_path / "bundle", CpuBackend(torch.bfloat16))
    assert count(engine, FusedDecoderLayer) == 2
    assert engine.model.fused is None
    assert fuse_decoder_layers(engine.model.model.modules(), engine.model.context.backend) == 0  # no second time
    monkeypatch.undo()
    assert fuse_model(engine.model.model, engine.model.context.backend, fixed=True) is not None


def test_what_a_rotary_embedding_gives_is_looked_up_bit_for_bit() -> None:
    module = MixtralRotaryEmbedding(make_config("mixtral", **WIDE))
    turning = Turning(module)
    generator = torch.Generator().manual_seed(0)
    for bound in (7, 1024, 1025, 5000, 40000):  # the last is beyond any table
        positions = torch.randint(bound, (9,), generator=generator)
        cos, sin = module(torch.empty(1, dtype=torch.bfloat16), positions[None])
        turns = turning.of(positions, bound)
        assert torch.equal(turns.cos[turns.positions], cos[0])
        assert torch.equal(turns.sin[turns.positions], sin[0])


def test_an_id_beyond_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints", dtype=torch.bfloat16, **WIDE)
    make_plan(paths, "separate", None, tmp_path / "bundle")
    engine = engine_of(tmp_path / "bundle", CpuBackend(torch.bfloat16))
    with pytest.raises(IndexError, match="vocabulary"):
        engine.prompt_logits([(0, [5, 112])])
    assert torch.isfinite(logits(engine)).all()
