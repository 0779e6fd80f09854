"""The stock model definition with its weights left out, and a trial run that shows whether we can serve it.

Nothing here knows an architecture by name. The network comes from transformers on the meta device; the trial run puts
variant stacks in every place and watches what attention asks for.
"""

import copy
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from polymoe.errors import UnsupportedModelError
from polymoe.model.attention import AttentionLayer, polymoe_attention_forward
from polymoe.model.context import ForwardBatch, ForwardContext, RowMap, segments_from_variants
from polymoe.model.expert_pool import polymoe_experts_forward
from polymoe.model.variant_stack import VariantStack

IMPLEMENTATION = "polymoe"
AttentionInterface.register(IMPLEMENTATION, polymoe_attention_forward)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, polymoe_experts_forward)

# Rotary tables of these kinds change with the longest sequence of a batch, which is not one request's own.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def build_skeleton(config: Any) -> PreTrainedModel:
    """The stock causal-LM definition of `config`: parameters on the meta device, computed buffers on the CPU.

    Experts and attention go through polymoe's entries in transformers' registries.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = IMPLEMENTATION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION)
    model.eval()
    model.set_experts_implementation(IMPLEMENTATION)
    _materialise_computed_buffers(model)
    return model


def _materialise_computed_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies …) are computed by the model's own initialiser."""
    for path, module in model.named_modules():
        computed = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        if not computed:
            continue
        for name in computed:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.full_like(buffer, float("nan") if buffer.is_floating_point() else 0, device="cpu")
        model._init_weights(module)
        for name in computed:
            buffer = module._buffers[name]
            assert buffer is not None
            if buffer.is_floating_point() and buffer.isnan().any():
                raise UnsupportedModelError(f"{path}.{name} is computed in a way that {type(model).__name__} does not expose.")


def expert_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """(path, module) of every routed-experts module, in layer order."""
    return [(p, m) for p, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")]


def expert_tensor_names(module: Any) -> list[str]:
    """Names of a routed-experts module's own tensors; axis 0 of each runs over experts."""
    return [name for name, p in module._parameters.items() if p is not None]


def set_weight(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    """Put `value` (plain tensor or `VariantStack`) where the parameter or buffer `name` is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    is_buffer = leaf in module._buffers
    module._buffers.pop(leaf, None)
    module._parameters.pop(leaf, None)
    if isinstance(value, VariantStack):
        setattr(module, leaf, value)
    elif is_buffer:
        module.register_buffer(leaf, value)
    else:
        module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))


def keeps_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers computes this weight in float32 although the model runs in `dtype`."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return any(part in kept for part in name.split("."))


def accepts_logits_to_keep(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def context_limit(config: Any) -> int:
    """Longest sequence, in tokens, that the configured positions cover."""
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for scheme in (r for r in (rope, *rope.values()) if isinstance(r, dict)):
        if scheme.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = scheme.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


class _TrialAttention:
    def __init__(self, layers: dict[int, AttentionLayer]) -> None:
        self.layers = layers

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        seen = AttentionLayer(kv_heads=key.shape[0], key_dim=key.shape[2], value_dim=value.shape[2])
        if layer in self.layers:
            raise UnsupportedModelError(f"layer {layer} attends twice, which one cache a layer cannot hold.")
        self.layers[layer] = seen
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[2])


class _TrialExperts:
    def forward(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if index.shape != weights.shape or index.shape[0] != hidden.shape[0]:
            raise UnsupportedModelError(f"{type(module).__name__} is not routed by (index, weight) pairs of each token.")
        return torch.zeros_like(hidden)


@torch.no_grad()
def trace(config: Any) -> dict[int, AttentionLayer]:
    """Run the stock forward pass once with two variants in every weight, and report each attention layer's cache shape.

    Weights are zeros without memory (stride 0), experts and attention are left out, so this takes seconds for any
    size. Raises `UnsupportedModelError` naming the operation or argument that cannot be served.
    """
    model = build_skeleton(config)
    name = type(model).__name__
    experts = expert_modules(model)
    context = ForwardContext()
    row_map = RowMap([0, 1])
    layers: dict[int, AttentionLayer] = {}
    expert_names = {f"{path}.{leaf}" for path, module in experts for leaf in expert_tensor_names(module)}
    tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    for weight, tensor in list(model.state_dict().items()):
        if weight not in expert_names and weight not in tied:
            rows = torch.zeros((), dtype=torch.float32).expand(2, *tensor.shape)
            set_weight(model, weight, VariantStack(rows, row_map, context))
    retie(model, tied)
    for module in model.modules():
        module.polymoe_attention = _TrialAttention(layers)  # type: ignore[assignment]
        module.polymoe_experts = _TrialExperts()  # type: ignore[assignment]

    # Not a size that any axis of the model has, so that no other axis is taken for the tokens.
    sizes = {size for p in model.state_dict().values() for size in p.shape} | {
        v for v in vars(config).values() if isinstance(v, int)
    }
    num_tokens = next(t for t in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47) if t not in sizes and t - 6 not in sizes)
    tokens = segments_from_variants([0, 1], [num_tokens - 6, 6])
    context.set(ForwardBatch(tokens=tokens, sampled=segments_from_variants([0, 1], [1, 2])))
    keep = torch.tensor([0, num_tokens - 2, num_tokens - 1])
    options = {"logits_to_keep": keep} if accepts_logits_to_keep(model) else {}
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    try:
        model(input_ids=ids, position_ids=torch.arange(num_tokens)[None], use_cache=False, **options)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name} cannot be served: {error}") from error
    except Exception as error:
        raise UnsupportedModelError(f"{name} cannot be served: its forward pass needs {error}") from error
    if not layers:
        raise UnsupportedModelError(f"{name} cannot be served: its attention does not go through transformers' registry.")
    return layers


def retie(model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Make every tied weight (target -> source) the same object as its source."""
    for target, source in tied.items():
        path, _, leaf = source.rpartition(".")
        value = getattr(model.get_submodule(path), leaf)
        if isinstance(value, VariantStack):
            set_weight(model, target, value)
        else:
            target_path, _, target_leaf = target.rpartition(".")
            setattr(model.get_submodule(target_path), target_leaf, value)
