"""States of sequences that ran in one call and go on apart, in parts that stand for themselves."""

import torch
from transformers.cache_utils import DynamicCache

from polymoe.model.per_variant.sequence_states import joined
from polymoe.model.stock.skeleton import build_skeleton, float32_weights
from try_architectures import architectures, small_config, try_one


def test_rows_of_a_cache_that_holds_nothing_yet() -> None:
    """Two prompts of one length shorter than what is compressed: an empty buffer of each goes with its row."""
    cache = DynamicCache()
    cache.update(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    cache.layers[0].buffers = {"kv": torch.zeros(2, 0, 4), "gate": None, "nothing": torch.tensor([])}
    one = joined([(cache, 1, 2)])
    assert one.layers[0].keys.tolist() == torch.ones(1, 1, 3, 4).tolist()
    assert one.layers[0].buffers["kv"].shape == (1, 0, 4)
    assert one.layers[0].buffers["nothing"].shape == (0,)
    assert joined([(one, 0, 1), (cache, 0, 2)]).layers[0].buffers["kv"].shape == (2, 0, 4)


def test_prompts_of_one_length_in_one_call_that_joins_its_mask_to_each() -> None:
    """DeepSeek-V4's attention appends what each sequence may see of its compressed keys to the mask."""
    outcome = try_one("deepseek_v4", "deepseek_v4")
    assert outcome.result == "exact", outcome


def test_weights_that_stay_in_float32() -> None:
    """By transformers' lists, whose entries are searched for in names, and by what a definition makes in float32."""
    known = architectures()
    expected = {
        "beam": {"mlp.gate.weight", "e_score_correction_bias"},  # a path, not one part of a name
        "inkling2": {"mlp.gate.weight", "k_sconv.conv1d.weight", "mlp_input.query"},
        "hunyuan_v1_moe": {"mlp.gate.wg.weight"},  # on no list
        "lfm2_moe": {"feed_forward.expert_bias"},
    }
    for name, ends in expected.items():
        model = build_skeleton(small_config(known[name]))
        found = float32_weights(model, torch.bfloat16)
        for end in ends:
            named = [weight for weight in model.state_dict() if weight.endswith(end)]
            assert named
            assert set(named) <= found, (name, end)
        assert not any("q_proj" in weight or "embed_tokens" in weight for weight in found), name
        assert float32_weights(model, torch.float32) <= found
