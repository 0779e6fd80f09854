"""The exactness suite's checkpoints have the names that the published ones have, layer numbers aside."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from families import STORED, make_family
from hub_layouts import as_on_the_hub

ATTENTION = "self_attn.{q,k,v,o}_proj.weight"
# Family of the suite -> names in the published checkpoint: everywhere, and in its layers. {a,b}: either.
PUBLISHED = {
    "qwen3_5_moe_text": (  # Qwen3.5-35B-A3B
        "lm_head.weight model.language_model.{embed_tokens,norm}.weight mtp.fc.weight "
        "mtp.{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight "
        "mtp.layers.#.{input_layernorm,post_attention_layernorm}.weight "
        f"mtp.layers.#.self_attn.{{q,k}}_norm.weight mtp.layers.#.{ATTENTION} "
        "mtp.layers.#.mlp.{gate,shared_expert_gate}.weight mtp.layers.#.mlp.experts.{gate_up,down}_proj "
        "mtp.layers.#.mlp.shared_expert.{gate,up,down}_proj.weight "
        "model.visual.{patch_embed.proj,blocks.#.attn.qkv,blocks.#.norm1}.{weight,bias} "
        "model.visual.{pos_embed,blocks.#.attn.proj,blocks.#.mlp.linear_fc1,blocks.#.mlp.linear_fc2}.weight "
        "model.visual.merger.{norm,linear_fc1,linear_fc2}.weight",
        "model.language_model.layers.#.",
        "{input_layernorm,post_attention_layernorm}.weight linear_attn.{A_log,dt_bias,conv1d.weight,norm.weight} "
        f"linear_attn.{{in_proj_qkv,in_proj_z,in_proj_b,in_proj_a,out_proj}}.weight {ATTENTION} "
        "self_attn.{q,k}_norm.weight mlp.{gate,shared_expert_gate}.weight mlp.experts.{gate_up,down}_proj "
        "mlp.shared_expert.{gate,up,down}_proj.weight",
    ),
    "granitemoehybrid": (  # Granite 4.0 H Tiny
        "model.{embed_tokens,norm}.weight",
        "model.layers.#.",
        "{input_layernorm,post_attention_layernorm}.weight mamba.{A_log,D,dt_bias,conv1d.weight,conv1d.bias} "
        f"mamba.{{in_proj,norm,out_proj}}.weight {ATTENTION} {{block_sparse_moe,shared_mlp}}.input_linear.weight "
        "{block_sparse_moe,shared_mlp}.output_linear.weight block_sparse_moe.router.layer.weight",
    ),
    "nemotron_h": (  # Nemotron 3 Nano
        "lm_head.weight backbone.{embeddings,norm_f}.weight",
        "backbone.layers.#.",
        "norm.weight mixer.{A_log,D,dt_bias,conv1d.weight,conv1d.bias} mixer.{in_proj,norm,out_proj}.weight "
        "mixer.{q,k,v,o}_proj.weight mixer.gate.{weight,e_score_correction_bias} "
        "mixer.experts.#.{up,down}_proj.weight mixer.shared_experts.{up,down}_proj.weight",
    ),
    "lfm2_moe": (  # LFM2-8B-A1B
        "model.{embed_tokens,embedding_norm}.weight",
        "model.layers.#.",
        "{ffn_norm,operator_norm}.weight conv.{conv,in_proj,out_proj}.weight self_attn.{q,k,v}_proj.weight "
        "self_attn.out_proj.weight self_attn.{q,k}_layernorm.weight feed_forward.{w1,w2,w3}.weight "
        "feed_forward.{gate.weight,expert_bias} feed_forward.experts.#.{w1,w2,w3}.weight",
    ),
    "gpt_oss_mxfp4": (  # gpt-oss-20b
        "lm_head.weight model.{embed_tokens,norm}.weight",
        "model.layers.#.",
        f"{{input_layernorm,post_attention_layernorm}}.weight {ATTENTION} self_attn.{{q,k,v,o}}_proj.bias "
        "self_attn.sinks mlp.router.{weight,bias} mlp.experts.{gate_up,down}_proj_{blocks,scales,bias}",
    ),
    "qwen3_moe_fp8": (  # Qwen3-30B-A3B-FP8
        "lm_head.weight model.{embed_tokens,norm}.weight",
        "model.layers.#.",
        "{input_layernorm,post_attention_layernorm}.weight self_attn.{q,k}_norm.weight mlp.gate.weight "
        "self_attn.{q,k,v,o}_proj.{weight,weight_scale_inv} "
        "mlp.{experts.#.,}{gate,up,down}_proj.{weight,weight_scale_inv}",
    ),
    "deepseek_v32": (  # DeepSeek-V3.2
        "lm_head.weight model.{embed_tokens,norm}.weight",
        "model.layers.#.",
        "{input_layernorm,post_attention_layernorm}.weight mlp.gate.{weight,e_score_correction_bias} "
        "self_attn.{q_a_layernorm,kv_a_layernorm,indexer.k_norm,indexer.weights_proj}.weight "
        "self_attn.{q_a_proj,q_b_proj,kv_b_proj,o_proj,kv_a_proj_with_mqa}.{weight,weight_scale_inv} "
        "self_attn.indexer.{wq_b,wk}.{weight,weight_scale_inv} self_attn.indexer.k_norm.bias "
        "mlp.{experts.#.,shared_experts.,}{gate,up,down}_proj.{weight,weight_scale_inv} "
        "{enorm,hnorm,embed_tokens,shared_head.norm,shared_head.head}.weight eh_proj.{weight,weight_scale_inv}",
    ),
}


def expanded(pattern: str) -> set[str]:
    """`a.{b,c}` -> a.b, a.c"""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return {pattern}
    return {name for part in match[1].split(",") for name in expanded(pattern.replace(match[0], part, 1))}


@pytest.mark.parametrize("family", PUBLISHED)
def test_names_are_the_published_ones(family: str, tmp_path: Path) -> None:
    folder = make_family(family, tmp_path, 1)["base"]
    as_on_the_hub(STORED[family][0] if family in STORED else family, folder)
    outside, layer, inside = PUBLISHED[family]
    known = {name for pattern in outside.split() for name in expanded(pattern)}
    known |= {layer + name for pattern in inside.split() for name in expanded(pattern)}
    stored = {re.sub(r"\.\d+(?=\.)", ".#", name) for name in load_file(folder / "model.safetensors")}
    assert stored == known
