"""Encoder–decoder models (Switch Transformers) on a device, all variants in one batch.

For the scheduler a sequence is one row of tokens; the encoder's prompt stands before what the decoder has:

    |------ prompt (encoder) ------|-- decoder start, generated tokens --|
    keys and values of the prompt   of the decoder's own tokens            in the same blocks of the same cache
      (cross-attention reads these)   (self-attention reads these)

The encoder reads a prompt whole, once, in the pass in which its last token is scheduled: prompts of all variants
together, padded on the right to `[P, S]`. The decoder's tokens are rows of one token each, `[T, 1]`, since the capacity
of Switch's experts counts the tokens of a row and `generate` feeds one at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions

from polymoe.model.attention.cross import CrossAttention, DecoderAttention, EncoderAttention
from polymoe.model.attention.paged import KVCache
from polymoe.model.batch.batch import EncoderBatch, ForwardBatch
from polymoe.model.served_model import ServedModel


class _Passing(DynamicCache):  # type: ignore[misc]
    """Keeps nothing: our attention writes keys and values into the paged cache itself."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


@dataclass(frozen=True)
class _Encoded:
    """Stands for one layer of the cross-attention cache, which our attention reads where it is."""

    keys: torch.Tensor
    values: torch.Tensor


class _PagedCaches(EncoderDecoderCache):  # type: ignore[misc]
    """What the stock decoder asks of its caches. `placeholder [T, H, 1, D]`."""

    def __init__(self, placeholder: torch.Tensor, num_layers: int) -> None:
        super().__init__(_Passing(), DynamicCache())
        self.is_updated = dict.fromkeys(range(num_layers), True)  # no layer projects the prompt again
        self.cross_attention_cache.layers = [_Encoded(placeholder, placeholder)] * num_layers


class EncoderDecoderModel(ServedModel):
    """A `ServedModel` whose passes may begin with prompts for the encoder (`ForwardBatch.encoder`)."""

    def attach_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Allocate the cache and hand it to every attention module."""
        cache = super().attach_kv_cache(num_blocks, block_size)
        encoder_bias = self.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        decoder_bias = self.model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
        encoder_bias.context = decoder_bias.context = self.context
        for block in self.model.encoder.block:
            block.layer[0].SelfAttention.polymoe_attention = EncoderAttention(self.context, encoder_bias)
        for block in self.model.decoder.block:
            block.layer[0].SelfAttention.polymoe_attention = DecoderAttention(self.context, cache, decoder_bias)
            block.layer[1].EncDecAttention.polymoe_attention = CrossAttention(self.context, cache)
        return cache

    def compute(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,  # noqa: ARG002  (they are relative)
        batch: ForwardBatch,
        sampled_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The passes themselves: the prompts of `batch.encoder` first; then T may be 0."""
        try:
            if batch.encoder is not None:
                self._encode(batch.encoder)
            self.context.set(batch)
            return self._decode(input_ids, sampled_rows)
        finally:
            self.context.set(None)

    def _encode(self, prompts: EncoderBatch) -> None:
        """Run the encoder and write the prompts' keys and values for every layer's cross-attention."""
        num_prompts, length = prompts.input_ids.shape
        self.context.set(ForwardBatch(tokens=prompts.rows, sampled=prompts.rows, shape=(num_prompts, length)))
        lengths = torch.tensor(prompts.lengths, device=self.device)
        real = torch.arange(length, device=self.device) < lengths[:, None]  # [P, S]
        hidden = self.model.encoder(input_ids=prompts.input_ids, attention_mask=real.to(self.dtype)).last_hidden_state
        for index, block in enumerate(self.model.decoder.block):
            attention = block.layer[1].EncDecAttention
            shape = (num_prompts, length, attention.n_heads, attention.key_value_proj_dim)
            key, value = (projection(hidden).view(shape)[real] for projection in (attention.k, attention.v))
            self.kv_cache.write(index, prompts.slot_mapping, key, value)

    def _decode(self, input_ids: torch.Tensor, sampled_rows: torch.Tensor | None) -> torch.Tensor:
        width = self.model.config.d_model
        count = len(input_ids)
        if count == 0:
            return torch.empty(0, self.model.lm_head.weight.shape[0], device=self.device, dtype=self.dtype)
        layer = self.attention_layers[0]
        placeholder = torch.zeros((), device=self.device, dtype=self.dtype)
        output = self.model(
            encoder_outputs=MoEModelOutputWithPastAndCrossAttentions(
                last_hidden_state=placeholder.expand(count, 1, width)
            ),
            decoder_input_ids=input_ids[:, None],
            past_key_values=_PagedCaches(
                placeholder.expand(count, layer.kv_heads, 1, layer.key_dim), len(self.attention_layers)
            ),
        )
        logits: torch.Tensor = output.logits[:, 0]
        return logits if sampled_rows is None or len(sampled_rows) == count else logits[sampled_rows]
