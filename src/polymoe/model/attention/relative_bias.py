"""Relative position biases of encoder–decoder models, where each row of a batch has its own variant and its own past.

The stock definition computes one bias for a whole batch, in the first layer of a stack, and hands it down. These stand
where its embedding of buckets stands, compute what the pass needs when it is called, and keep it for all layers; what
they return is not used. Which distance falls into which bucket is the stock definition's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from polymoe.model.backends.context import ForwardContext
from polymoe.model.variants.variant_stack import VariantStack


class _BucketBias(nn.Module):
    """`weight [buckets, heads]`, as the stock embedding has it: a parameter or a `VariantStack`."""

    def __init__(self, stock: nn.Embedding) -> None:
        super().__init__()
        self.weight: Any = stock.weight

    def _unused(self, buckets: torch.Tensor) -> torch.Tensor:
        """Zeros of the stock result's shape `[queries, keys, heads]`, without memory."""
        return torch.zeros((), device=buckets.device).expand(*buckets.shape, self.weight.shape[1])


class EncoderBias(_BucketBias):
    """`of_variant`: variant -> `[heads, S, S]` for the padded batch of the pass."""

    context: ForwardContext

    def forward(self, buckets: torch.Tensor) -> torch.Tensor:
        """`buckets [S, S]`: of each (query, key)."""
        self.of_variant: dict[int, torch.Tensor] = {}
        for variant, _, _ in self.context.batch.tokens.spans:
            weight = self.weight
            if isinstance(weight, VariantStack):
                weight = weight.rows[weight.row_map.rows[variant]]
            self.of_variant[variant] = F.embedding(buckets, weight).permute(2, 0, 1)
        return self._unused(buckets)


class DecoderBias(_BucketBias):
    """For T tokens that see up to L tokens of their own sequence, themselves included.

    `scores [T, heads, L]` float32: the bias, minus infinity for what is past a token's own.
    """

    context: ForwardContext

    def __init__(self, stock: nn.Embedding, attention: Any) -> None:
        super().__init__(stock)
        self._bucket = attention._relative_position_bucket
        self._buckets, self._farthest = (
            attention.relative_attention_num_buckets,
            attention.relative_attention_max_distance,
        )

    def forward(self, buckets: torch.Tensor) -> torch.Tensor:
        """`buckets`: what the stock definition thinks, for one common past; only its shape is used."""
        batch = self.context.batch
        assert batch.attention is not None
        assert batch.attention.token_encoder_len is not None
        seen = batch.attention.token_visible - batch.attention.token_encoder_len
        offsets = torch.arange(int(seen.max()), device=seen.device)
        distance = offsets - (seen - 1)[:, None]
        bucket = self._bucket(distance, bidirectional=False, num_buckets=self._buckets, max_distance=self._farthest)
        weight = self.weight
        if isinstance(weight, VariantStack):
            bucket = bucket + batch.segments(len(seen)).row_of_token(weight.row_map)[:, None] * self._buckets
            weight = weight.rows.flatten(0, 1)
        scores = F.embedding(bucket, weight).float().masked_fill_((distance > 0)[..., None], float("-inf"))
        self.scores = scores.transpose(1, 2).contiguous()
        return self._unused(buckets)


def replace_relative_biases(model: PreTrainedModel) -> None:
    """Put `EncoderBias` and `DecoderBias` where the stacks' first layers embed buckets."""
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        stock = attention.relative_attention_bias
        attention.relative_attention_bias = DecoderBias(stock, attention) if stack.is_decoder else EncoderBias(stock)
