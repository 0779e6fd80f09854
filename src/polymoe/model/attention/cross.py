"""The three attentions of an encoder–decoder model over padded prompts and one paged cache.

Prompts and the decoder's tokens share the blocks of their sequence: see `polymoe.model.encoder_decoder`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from polymoe.model.attention.paged import KVCache
from polymoe.model.attention.relative_bias import DecoderBias, EncoderBias
from polymoe.model.backends.base import TokenSpans
from polymoe.model.backends.context import ForwardContext


def attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers' attention registry: `query [B, H, n, D]` -> `[B, n, H, D]`."""
    return module.polymoe_attention.forward(module.layer_idx, query, key, value, attention_mask), None


class EncoderAttention:
    """Every token of a prompt sees all of it."""

    def __init__(self, context: ForwardContext, bias: EncoderBias) -> None:
        self.context, self.bias = context, bias

    def forward(
        self, _layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`query, key, value [P, H, S, D]`, `mask [P, 1, 1, S]` to be added to the scores."""
        out = torch.empty_like(query)
        length = query.shape[2]
        for variant, first, last in self.context.batch.tokens.spans:
            own = slice(first // length, last // length)
            scores = self.bias.of_variant[variant] + mask[own]
            out[own] = F.scaled_dot_product_attention(query[own], key[own], value[own], attn_mask=scores, scale=1.0)
        return out.transpose(1, 2)


class DecoderAttention:
    """A token sees those of its own sequence that the decoder had before it."""

    def __init__(self, context: ForwardContext, cache: KVCache, bias: DecoderBias) -> None:
        self.context, self.cache, self.bias = context, cache, bias

    def forward(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any
    ) -> torch.Tensor:
        """`query, key, value [T, H, 1, D]`."""
        batch = self.context.batch.attention
        assert batch is not None
        assert batch.token_encoder_len is not None
        self.cache.write(layer, batch.slot_mapping, key[:, :, 0], value[:, :, 0])
        sequence, visible = batch.token_sequence, batch.token_visible
        starts, caches = batch.token_encoder_len, (self.cache.key[layer], self.cache.value[layer])
        spans = TokenSpans(batch.block_table, sequence, visible, starts, self.bias.scores)
        return self.context.backend.span_attention(query[:, :, 0], caches, spans)[:, None]


class CrossAttention:
    """A token of the decoder sees all of its sequence's prompt."""

    def __init__(self, context: ForwardContext, cache: KVCache) -> None:
        self.context, self.cache = context, cache

    def forward(self, layer: int, query: torch.Tensor, _key: Any, _value: Any, _mask: Any) -> torch.Tensor:
        """`query [T, H, 1, D]`."""
        batch = self.context.batch.attention
        assert batch is not None
        assert batch.token_encoder_len is not None
        caches, sequence = (self.cache.key[layer], self.cache.value[layer]), batch.token_sequence
        visible = batch.token_encoder_len
        spans = TokenSpans(batch.block_table, sequence, visible)
        return self.context.backend.span_attention(query[:, :, 0], caches, spans)[:, None]
