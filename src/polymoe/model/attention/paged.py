"""Paged attention behind transformers' attention registry.

The stock attention module computes queries, keys and values for the flattened batch `[1, heads, T, D]`; the function
registered here writes the new keys and values into the paged cache and attends for each sequence to its own blocks.
Grouped-query heads are folded into the query axis, so keys are never repeated; sinks are one more key column whose
score is the sink and whose value is zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.errors import UnsupportedModelError
from polymoe.kernels.cpu.paged_attention import paged_attention
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import AttentionBatch
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

    def gather(self, layer: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`block_table [B, M]` -> keys and values `[B, M * block_size, kv_heads, D]`."""
        return self.key[layer][block_table].flatten(1, 2), self.value[layer][block_table].flatten(1, 2)


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
        num_tokens = query.shape[1]
        self.cache.write(layer, batch.slot_mapping, key.transpose(0, 1), value.transpose(0, 1))
        window = self.cache.layers[layer].sliding_window
        sinks = options.pop("sinks")
        if isinstance(sinks, VariantStack):
            sinks = sinks.per_token(num_tokens)
        elif sinks is not None:
            sinks = sinks.expand(num_tokens, -1)
        if self.context.kernels is not None:
            caches = self.cache.key[layer], self.cache.value[layer]
            own = query.transpose(0, 1)
            return self.context.kernels.attention(own, *caches, batch, window=window, sinks=sinks, **options)
        if sinks is None and options.get("softcap") is None:
            own, caches = query.transpose(0, 1).contiguous(), (self.cache.key[layer], self.cache.value[layer])
            tokens = batch.token_sequence, batch.token_visible
            fast = paged_attention(own, *caches, batch.block_table, *tokens, options["scaling"], window)
            if fast is not None:
                return fast
        if not batch.prefill_seqs:  # the sequences' single tokens are all rows, in order
            return self._decode(layer, batch, query.transpose(0, 1), window, sinks, **options)
        out = query.new_empty(num_tokens, query.shape[0], value.shape[-1])
        if batch.decode_seqs:
            rows = torch.tensor([batch.query_start_loc[i] for i in batch.decode_seqs], device=query.device)
            own_sinks = None if sinks is None else sinks[rows]
            out[rows] = self._decode(layer, batch, query.transpose(0, 1)[rows], window, own_sinks, **options)
        for index in batch.prefill_seqs:
            self._prefill(layer, batch, index, query, window, sinks, out, **options)
        return out

    def _decode(
        self, layer: int, batch: AttentionBatch, query: torch.Tensor, window: int | None, sinks: Any, **options: Any
    ) -> torch.Tensor:
        """All sequences with one query token, in one padded batch.

        `query [D, Hq, dim]`, `sinks [D, Hq]` or None -> `[D, Hq, Dv]`.
        """
        seq_lens = [batch.seq_lens[i] for i in batch.decode_seqs]
        num_blocks = (max(seq_lens) + self.cache.block_size - 1) // self.cache.block_size
        table = batch.block_table[list(batch.decode_seqs), :num_blocks]
        lens = torch.tensor(seq_lens, device=query.device)
        keys, values = self.cache.gather(layer, table)
        positions = torch.arange(keys.shape[1], device=query.device)
        visible = positions < lens[:, None]  # [D, L]
        for gathered in (keys, values):  # what a block's last owner left may be NaN, which no mask takes away
            gathered.masked_fill_(~visible[..., None, None], 0)
        if window is not None:
            visible &= positions >= (lens - window)[:, None]
        own_sinks = None if sinks is None else sinks[:, :, None]
        return attend(query[:, :, None], keys, values, visible[:, None], sinks=own_sinks, **options)[:, :, 0]

    def _prefill(
        self, layer: int, batch: AttentionBatch, index: int, query: torch.Tensor, window: int | None, sinks: Any,
        out: torch.Tensor, **options: Any,
    ) -> None:  # fmt: skip
        """One sequence with several query tokens, which stand at its end."""
        start, end = batch.query_start_loc[index], batch.query_start_loc[index + 1]
        seq_len = batch.seq_lens[index]
        num_blocks = (seq_len + self.cache.block_size - 1) // self.cache.block_size
        keys, values = self.cache.gather(layer, batch.block_table[index : index + 1, :num_blocks])
        keys, values = keys[:, :seq_len], values[:, :seq_len]
        key_pos = torch.arange(seq_len, device=query.device)
        query_pos = key_pos[seq_len - (end - start) :, None]
        visible = key_pos <= query_pos  # [n, L]
        if window is not None:
            visible &= key_pos > query_pos - window
        sink = None if sinks is None else sinks[start:end].t()[None]  # [1, Hq, n]
        out[start:end] = attend(query[None, :, start:end], keys, values, visible[None], sinks=sink, **options)[
            0
        ].transpose(0, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    scaling: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scaling, sinks) v over the visible keys, with grouped-query heads.

    Args:
        query: `[B, Hq, n, D]`; key `[B, L, Hk, D]`; value `[B, L, Hk, Dv]`, Hq a multiple of Hk.
        visible: `[B, n, L]` bool.
        sinks: `[B, Hq, n]` extra scores that take probability and give nothing.
        softcap: scores become `softcap · tanh(score / softcap)`.

    Returns: `[B, Hq, n, Dv]`.
    """
    batch, q_heads, n, _ = query.shape
    kv_heads = key.shape[2]
    group = q_heads // kv_heads
    q = query.reshape(batch, kv_heads, group * n, -1)  # heads of a group become more queries of their key head
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    mask = visible[:, None, None].expand(batch, 1, group, n, -1).reshape(batch, 1, group * n, -1)
    if softcap is not None:
        scores = (q @ k.transpose(-2, -1) * scaling).float()
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.reshape(batch, kv_heads, group * n, 1).float()], dim=-1)
        probs = torch.softmax(scores, dim=-1)[..., : k.shape[2]].to(v.dtype)
        return (probs @ v).reshape(batch, q_heads, n, -1)
    if sinks is not None:
        bias = torch.zeros(batch, kv_heads, group * n, k.shape[2] + 1, device=q.device, dtype=q.dtype)
        bias[..., :-1].masked_fill_(~mask, float("-inf"))
        bias[..., -1] = sinks.reshape(batch, kv_heads, group * n)
        mask = bias
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(batch, q_heads, n, -1)


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
