"""What stands in a trial run for weights, experts and attention: zeros without memory, and checks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import AttentionLayer, check_attention_arguments
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import RowMap
from polymoe.model.stock.asked_mask import AskedMask, ask_mask
from polymoe.model.stock.skeleton import expert_tensor_names
from polymoe.model.variants.variant_stack import METADATA, VariantStack

TRIAL = "polymoe_trial"  # attention's name in transformers' registry
USES = {(F.linear, 1): "product", (F.embedding, 1): "look-up"}  # and the argument that is the weight
_EXPERT_TENSORS = {f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")}


def _trial_attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Stands where `polymoe_attention_forward` stands in service; zeros of the right shape."""
    mask = attention_mask if isinstance(attention_mask, AskedMask) else None
    if mask is not None and not mask.is_window:
        raise UnsupportedModelError("its attention mask is neither causal nor a causal sliding window.")
    check_attention_arguments(module, attention_mask if mask is None else None, kwargs)
    # Only the mask counts in transformers' own attention; the argument is for kernels that build the mask themselves.
    window = None if mask is None else mask.window
    argument = kwargs.get("sliding_window")
    if argument is not None and argument != window and not (window is None and mask and argument >= mask.length):
        raise UnsupportedModelError(
            f"{type(module).__name__} gives attention a sliding window of {argument} tokens and a mask of "
            f"{window or 'all'}."
        )
    given = {"sinks": kwargs.get("sinks", kwargs.get("s_aux")), "softcap": kwargs.get("softcap")}
    extras = tuple(name for name, value in given.items() if value is not None)
    module.polymoe_attention.see(module.layer_idx, query[0], key[0], value[0], window, extras)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(TRIAL, _trial_attention_forward)
AttentionMaskInterface.register(TRIAL, ask_mask)


class TrialAttention:
    def __init__(self, layers: dict[int, AttentionLayer], tainted: int) -> None:
        self.layers, self.tainted = layers, tainted

    def see(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None,
        extras: tuple[str, ...],
    ) -> None:  # fmt: skip
        for tensor in (query, key, value):  # [heads, T, D]
            check_local(tensor.transpose(0, 1).flatten(1), self.tainted, f"layer {layer}")
        if layer in self.layers:
            raise UnsupportedModelError(f"layer {layer} attends twice, which one cache a layer cannot hold.")
        self.layers[layer] = AttentionLayer(
            kv_heads=key.shape[0], key_dim=key.shape[2], value_dim=value.shape[2], sliding_window=window, extras=extras
        )


class TrialExperts:
    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    def forward(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        name = type(module).__name__
        if index.shape != weights.shape or index.shape[0] != hidden.shape[0]:
            raise UnsupportedModelError(f"{name} is not routed by (index, weight) pairs of each token.")
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{name} normalises the output of each expert, which the expert pool does not do."
            )
        if strange := set(expert_tensor_names(module)) - _EXPERT_TENSORS:
            raise UnsupportedModelError(
                f"{name} has expert tensors that the pool does not use: {', '.join(sorted(strange))}."
            )
        self.context.batch.segments(hidden.shape[0])
        return hidden * 0 + weights.sum(dim=-1, keepdim=True).to(hidden.dtype) * 0  # zeros that keep NaN


class TrialStack(VariantStack):
    """A stack of zeros whose matmuls cost nothing, whatever its size.

    uses: the operations that it met; "product" and "look-up" for those in which it is the weight.
    """

    uses: set[str]

    @staticmethod
    def __new__(
        cls, rows: torch.Tensor, row_map: RowMap, context: ForwardContext, token_axes: dict[int, int] | None = None
    ) -> "TrialStack":
        stack: Any = VariantStack.__new__(cls, rows, row_map, context, token_axes)
        stack.uses = set()
        found: TrialStack = stack
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in METADATA:
            for place, stack in enumerate((*args, *(kwargs or {}).values())):
                if isinstance(stack, TrialStack):
                    stack.uses.add(USES.get((func, place), str(func)))
        if func is F.linear and isinstance(args[1], VariantStack) and not kwargs:
            x, weight = args[0], args[1]
            weight.context.batch.segments(x.numel() // x.shape[-1])
            assert x.shape[-1] == weight.shape[1]
            return x.sum(dim=-1, keepdim=True).mul(0).repeat(*(1,) * (x.ndim - 1), weight.shape[0])
        return super().__torch_function__(func, types, args, kwargs)


def check_local(rows: torch.Tensor, tainted: int | None, where: str) -> None:
    """`rows [T, …]`: only row `tainted` (None: none) may hold NaN."""
    others = rows.isnan().any(dim=-1)
    if tainted is not None:
        others[tainted] = False
    if others.any():
        raise UnsupportedModelError(
            f"tokens reach each other before {where} other than through attention, and a paged KV cache keeps no such "
            "state."
        )
