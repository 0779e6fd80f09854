"""The trial run refuses, with a reason, what would go wrong at request time, and learns what the weights must know."""

import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.phimoe import modeling_phimoe as phimoe

from families import ARCHITECTURES, make_config
from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import AttentionLayer
from polymoe.model.stock import probe as trial
from polymoe.model.stock.probe import trace


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_proven_architectures_pass(arch: str) -> None:
    config = make_config(arch)
    assert sorted(trace(config).attention_layers) == list(range(config.num_hidden_layers))


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


def test_a_full_sized_model_takes_seconds_and_no_memory() -> None:
    started = time.perf_counter()
    assert len(trace(AutoConfig.for_model("deepseek_v3")).attention_layers) == 61
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}, "has conv layers"),
        ("deepseek_v32", {}, "has indexed_attention layers"),
        ("llama4_text", {}, "has chunked_attention layers"),
        ("gpt2", {}, "addmm is not supported on weights"),
        ("bert", {"is_decoder": False}, "cannot be served"),
    ],
)
def test_refused_by_name(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        trace(AutoConfig.for_model(model_type, **{"num_hidden_layers": 2, **fields}))


def test_a_chunked_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_PLAIN_LAYERS", {"full_attention", "chunked_attention"})
    with pytest.raises(UnsupportedModelError, match="neither causal nor a causal sliding window"):
        trace(AutoConfig.for_model("llama4_text", num_hidden_layers=2, attention_chunk_size=64))


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
