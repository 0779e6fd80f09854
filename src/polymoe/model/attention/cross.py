"""The three attentions of an encoder–decoder model over padded prompts and one paged cache.

Prompts and the decoder's tokens share the blocks of their sequence: see `polymoe.model.encoder_decoder`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from polymoe.kernels.cpu.paged_attention import paged_attention
from polymoe.model.attention.paged import KVCache, attend
from polymoe.model.attention.relative_bias import DecoderBias, EncoderBias
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
        own = query[:, :, 0].contiguous()
        fast = paged_attention(own, *caches, batch.block_table, sequence, visible, 1.0, None, starts, self.bias.scores)
        if fast is not None:
            return fast[:, None]
        positions = starts[:, None] + self.bias.offsets  # [T, L]
        blocks = batch.block_table[sequence[:, None], positions // self.cache.block_size]
        slots = blocks * self.cache.block_size + positions % self.cache.block_size
        keys, values = (side.flatten(0, 1)[slots].float() for side in caches)
        scores = torch.einsum("thd,tlhd->thl", own.float(), keys) + self.bias.scores
        out = torch.einsum("thl,tlhd->thd", torch.softmax(scores, dim=-1), values)
        return out[:, None].to(query.dtype)


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
        fast = paged_attention(query[:, :, 0].contiguous(), *caches, batch.block_table, sequence, visible, 1.0, None)
        if fast is not None:
            return fast[:, None]
        num_blocks = (int(visible.max()) + self.cache.block_size - 1) // self.cache.block_size
        keys, values = self.cache.gather(layer, batch.block_table[:, :num_blocks][sequence])
        seen = torch.arange(keys.shape[1], device=keys.device) < visible[:, None]
        for gathered in (keys, values):  # what a block's last owner left may be NaN, which no mask takes away
            gathered.masked_fill_(~seen[..., None, None], 0)
        return attend(query, keys, values, seen[:, None], scaling=1.0).transpose(1, 2)
