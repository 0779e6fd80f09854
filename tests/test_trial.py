"""The trial run refuses, with a reason, what would go wrong at request time, and learns what the weights must know."""

import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.lfm2_moe import modeling_lfm2_moe as lfm2_moe
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.phimoe import modeling_phimoe as phimoe

from families import ARCHITECTURES, WITH_STATES, make_config
from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import AttentionLayer
from polymoe.model.stock.probe import trace


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_proven_architectures_pass(arch: str) -> None:
    config = make_config(arch)
    trial = trace(config)
    if arch not in WITH_STATES:
        assert sorted(trial.attention_layers) == list(range(config.num_hidden_layers))
        assert not trial.per_variant
    else:
        assert any(spec.state.fixed or spec.state.per_token for spec in trial.per_variant.values())


def test_shape_of_the_cache() -> None:
    latent = trace(make_config("deepseek_v3")).attention_layers[0]
    assert latent == AttentionLayer(kv_heads=4, key_dim=16, value_dim=12, sliding_window=None)
    layers = trace(make_config("gpt_oss")).attention_layers
    assert [layers[i].sliding_window for i in range(3)] == [8, None, 8]


def test_the_window_is_read_from_the_mask() -> None:
    """Phi-MoE masks with a window but tells attention nothing about it: it was served with full attention."""
    assert trace(make_config("phimoe", sliding_window=8)).attention_layers[0].sliding_window == 8
    longest = make_config("phimoe").max_position_embeddings
    assert trace(make_config("phimoe", sliding_window=longest)).attention_layers[0].sliding_window is None


def test_where_the_tokens_are() -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    heads_first = trace(AutoConfig.for_model("hy_v3", **small, mlp_layer_types=["dense", "sparse"]))
    assert heads_first.token_axes["model.layers.0.self_attn.q_norm.weight"] == {4: 2}
    tokens_first = trace(make_config("qwen3_moe"))
    assert tokens_first.token_axes["model.layers.0.self_attn.q_norm.weight"] == {4: 1}
    assert tokens_first.token_axes["model.norm.weight"] == {3: 1}


def test_a_part_that_can_run_in_no_way_is_refused() -> None:
    """An index head smaller than its rotated part: stock transformers cannot run it either; it was tried for ever."""
    with pytest.raises(UnsupportedModelError, match="cannot be served"):
        trace(make_config("deepseek_v32", index_head_dim=4))


def test_a_checkpoint_in_bfloat16_is_tried_in_float32() -> None:
    """Rounding was taken for tokens that reach each other: MiniMax's own checkpoints were refused."""
    trial = trace(make_config("minimax", dtype=torch.bfloat16))
    assert len(trial.per_variant) == len(trace(make_config("minimax")).per_variant)


def test_a_full_sized_model_takes_seconds_and_no_memory() -> None:
    started = time.perf_counter()
    assert len(trace(AutoConfig.for_model("deepseek_v3")).attention_layers) == 61
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("qwen4_exp_text", {}, "keeps a state for all of its layers together"),
        ("bert", {"is_decoder": False}, "cannot be served"),
    ],
)
def test_refused_by_name(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        trace(AutoConfig.for_model(model_type, **{"num_hidden_layers": 2, **fields}))


def test_an_operation_that_stacks_do_not_know_runs_once_for_each_variant() -> None:
    """GPT-2 multiplies by `addmm`; llama 4 masks in chunks, which paged attention does not."""
    modules = trace(AutoConfig.for_model("gpt2", num_hidden_layers=1)).per_variant
    products = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    assert set(modules) == {f"transformer.h.0.{name}" for name in products}
    assert not any(spec.state.fixed or spec.state.per_token for spec in modules.values())


def test_a_chunked_mask_is_no_paged_attentions() -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=2, head_dim=16, attention_chunk_size=64, **small)
    assert not trace(config).attention_layers


def test_state_that_a_module_forgets_between_chunks_is_fed_token_by_token() -> None:
    """Jamba's state space starts anew when it is given several tokens at once; others go on."""
    assert all(spec.one_by_one for spec in trace(make_config("jamba")).per_variant.values())
    assert not any(spec.one_by_one for spec in trace(make_config("qwen3_5_moe_text")).per_variant.values())


@pytest.mark.parametrize(("arch", "joint"), [("qwen3_5_moe_text", True), ("lfm2_moe", True), ("nemotron_h", False)])
def test_where_one_call_serves_all_that_decode(arch: str, joint: bool) -> None:
    """Mamba expands its weights to the batch, which a stack cannot: those run once for each variant."""
    assert {spec.joint for spec in trace(make_config(arch)).per_variant.values()} == {joint}


def test_what_stacks_would_compute_otherwise_runs_once_for_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over the batch: right for sequences of one variant as well, but it would mix the weights of several."""
    stock = lfm2_moe.Lfm2MoeShortConv.forward

    def scaled(self: Any, hidden_states: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values.get_conv_state(self.layer_idx, 0)
        factor = torch.ones_like(hidden_states) * self.conv.weight[:, 0, 0]
        return stock(self, hidden_states * factor.amax(dim=0, keepdim=True), past_key_values, **kwargs)

    monkeypatch.setattr(lfm2_moe.Lfm2MoeShortConv, "forward", scaled)
    specs = trace(make_config("lfm2_moe")).per_variant.values()
    assert specs
    assert not any(spec.joint for spec in specs)


def test_a_state_outside_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = lfm2_moe.Lfm2MoeShortConv.forward

    def shifted(self: Any, hidden_states: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values.get_conv_state(self.layer_idx, 0)
        return stock(self, hidden_states + torch.roll(hidden_states, 1, dims=1), past_key_values, **kwargs)

    monkeypatch.setattr(lfm2_moe.Lfm2MoeShortConv, "forward", shifted)
    with pytest.raises(UnsupportedModelError, match="by other ways than transformers' cache"):
        trace(make_config("lfm2_moe"))


def test_sequences_that_meet_in_a_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = lfm2_moe.Lfm2MoeShortConv.forward

    def mixed(self: Any, hidden_states: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values.get_conv_state(self.layer_idx, 0)
        return stock(self, hidden_states + hidden_states.mean(dim=0, keepdim=True), past_key_values, **kwargs)

    monkeypatch.setattr(lfm2_moe.Lfm2MoeShortConv, "forward", mixed)
    with pytest.raises(UnsupportedModelError, match="mixes the sequences of a batch"):
        trace(make_config("lfm2_moe"))


def test_a_window_that_the_mask_does_not_show_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtral, "create_sliding_window_causal_mask", mixtral.create_causal_mask)
    with pytest.raises(UnsupportedModelError, match="a sliding window of 8 tokens and a mask of all"):
        trace(make_config("mixtral", sliding_window=8))


@pytest.mark.parametrize("where", ["MixtralAttention", "MixtralSparseMoeBlock"])
def test_tokens_that_reach_each_other_outside_attention_are_refused(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stock = getattr(mixtral, where).forward

    def shifted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mixed = hidden_states + torch.roll(hidden_states, 1, dims=1)
        return stock(self, mixed, *args, **kwargs)

    monkeypatch.setattr(getattr(mixtral, where), "forward", shifted)
    with pytest.raises(UnsupportedModelError, match="tokens reach each other before"):
        trace(make_config("mixtral"))


def test_two_weights_combined_before_a_token_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It worked when all variants differ in both weights, and failed at the first request when one is shared."""
    stock = phimoe.PhimoeAttention.forward

    def combined(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return stock(self, hidden_states * (self.k_proj.bias + self.v_proj.bias).sum(), **kwargs)

    monkeypatch.setattr(phimoe.PhimoeAttention, "forward", combined)
    with pytest.raises(UnsupportedModelError, match="two weights"):
        trace(make_config("phimoe"))


def test_experts_with_a_norm_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mixtral.MixtralExperts, "has_post_expert_norm", property(lambda _: True, lambda _, __: None), False
    )
    with pytest.raises(UnsupportedModelError, match="normalises the output of each expert"):
        trace(make_config("mixtral"))
