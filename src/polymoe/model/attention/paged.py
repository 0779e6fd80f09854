"""Paged attention behind transformers' attention registry.

The stock attention module computes queries, keys and values for the flattened batch `[1, heads, T, D]`; the function
registered here writes the new keys and values into the paged cache; then the backend attends for each sequence to its
own blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch

from polymoe.errors import UnsupportedModelError
from polymoe.model.backends.base import ScoreOptions
from polymoe.model.backends.context import ForwardContext
from polymoe.model.variants.variant_stack import VariantStack

# What a stock attention may pass beside queries, keys and values, and what becomes of it.
_USED = {"scaling", "sliding_window", "s_aux", "sinks", "softcap", "is_causal"}
_FINE_IF_FALSY = {
    "dropout",
    "output_attentions",
    "use_cache",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
}
_POSITIONS = {"position_ids", "cache_position", "position_embeddings", "logits_to_keep"}


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer as seen in a trial run; its cache is `[block, block_size, kv_heads, key_dim / value_dim]`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None  # tokens that one sees, itself included; None: all
    extras: tuple[str, ...] = ()  # what only torch computes on a CPU: "sinks", "softcap"

    @property
    def elements_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class KVCache:
    """Keys and values of all layers in blocks of `block_size` tokens.

    Per layer `key [num_blocks, block_size, kv_heads, key_dim]`, `value [.., value_dim]`; `null_blocks` more
    at the end belong to no sequence: padded rows write there.
    """

    def __init__(
        self,
        layers: dict[int, AttentionLayer],
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        null_blocks: int = 0,
    ) -> None:
        self.layers, self.num_blocks, self.block_size = layers, num_blocks, block_size
        shape = (num_blocks + null_blocks, block_size)
        self.key = {
            i: torch.zeros(*shape, s.kv_heads, s.key_dim, device=device, dtype=dtype) for i, s in layers.items()
        }
        self.value = {
            i: torch.zeros(*shape, s.kv_heads, s.value_dim, device=device, dtype=dtype) for i, s in layers.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for side in (self.key, self.value) for t in side.values())

    def write(self, layer: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key, value [T, kv_heads, D]` at `slot_mapping [T]`."""
        self.key[layer].flatten(0, 1).index_copy_(0, slot_mapping, key)
        self.value[layer].flatten(0, 1).index_copy_(0, slot_mapping, value)


def check_attention_arguments(module: Any, attention_mask: Any, kwargs: dict[str, Any]) -> None:
    """Refuse anything that would have to be honoured and is not (relative biases, sparse indices, …)."""
    name = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} builds its own attention mask, which paged attention cannot honour.")
    if not kwargs.get("is_causal", True) or not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{name} is not causal; only decoder attention is served.")
    for key, value in kwargs.items():
        if key in _USED or key in _POSITIONS or value is None or (key in _FINE_IF_FALSY and not value):
            continue
        raise UnsupportedModelError(f"{name} passes `{key}` to attention, which paged attention does not support.")


def asks_for_nothing(kwargs: dict[str, Any]) -> bool:
    """Whether nothing among what a stock attention is given, beside its inputs, changes what it computes."""
    return all(
        key in _POSITIONS or value is None or (key in _FINE_IF_FALSY and not value) for key, value in kwargs.items()
    )


class PagedAttention:
    """What the registered function needs: the context and the cache of one model; attached to its attention modules."""

    def __init__(self, context: ForwardContext, cache: KVCache) -> None:
        self.context, self.cache = context, cache

    def forward(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Attention of one layer for the flattened batch.

        Args:
            query: `[Hq, T, D]`; key `[Hk, T, D]`; value `[Hk, T, Dv]`.
            options: scaling, sinks (`[Hq]`, a stack or None), softcap (or None).

        Returns: `[T, Hq, Dv]`.
        """
        batch = self.context.batch.attention
        assert batch is not None
        self.cache.write(layer, batch.slot_mapping, key.transpose(0, 1), value.transpose(0, 1))
        sinks = options.pop("sinks")
        if isinstance(sinks, VariantStack):
            sinks = sinks.per_token(query.shape[1])
        elif sinks is not None:
            sinks = sinks.expand(query.shape[1], -1)
        caches = self.cache.key[layer], self.cache.value[layer]
        scores = ScoreOptions(window=self.cache.layers[layer].sliding_window, sinks=sinks, **options)
        return self.context.backend.attention(query.transpose(0, 1), caches, batch, scores)


def polymoe_attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers' attention registry under the name `polymoe`.

    `query [1, Hq, T, D]` and so on; returns `[1, T, Hq, Dv]` as stock modules expect.
    """
    check_attention_arguments(module, attention_mask, kwargs)
    out = module.polymoe_attention.forward(
        module.layer_idx,
        query[0],
        key[0],
        value[0],
        scaling=kwargs["scaling"] if kwargs.get("scaling") is not None else query.shape[-1] ** -0.5,
        sinks=kwargs.get("s_aux", kwargs.get("sinks")),
        softcap=kwargs.get("softcap"),
    )
    return out[None], None
