"""Attention over the paged cache in torch, on any device: what is visible is gathered.

Grouped-query heads are folded into the query axis, so keys are never repeated; sinks are one more key column whose
score is the sink and whose value is zero.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from polymoe.model.backends.base import Cache, ScoreOptions, TokenSpans
from polymoe.model.batch.batch import AttentionBatch


def batch_attention(query: torch.Tensor, cache: Cache, batch: AttentionBatch, scores: ScoreOptions) -> torch.Tensor:
    """`Backend.attention`."""
    if not batch.prefill_seqs:  # the sequences' single tokens are all rows, in order
        return _decode(query, cache, batch, scores)
    out = query.new_empty(*query.shape[:2], cache[1].shape[-1])
    if batch.decode_seqs:
        rows = torch.tensor([batch.query_start_loc[i] for i in batch.decode_seqs], device=query.device)
        out[rows] = _decode(query[rows], cache, batch, _of_rows(scores, rows))
    for index in batch.prefill_seqs:
        own = slice(*batch.query_start_loc[index : index + 2])
        out[own] = _prefill(query[own], cache, batch, index, _of_rows(scores, own))
    return out


def _of_rows(scores: ScoreOptions, rows: torch.Tensor | slice) -> ScoreOptions:
    return scores if scores.sinks is None else replace(scores, sinks=scores.sinks[rows])


def _decode(query: torch.Tensor, cache: Cache, batch: AttentionBatch, scores: ScoreOptions) -> torch.Tensor:
    """All sequences with one query token, in one padded batch: `query [D, Hq, dim]` -> `[D, Hq, Dv]`."""
    seq_lens = [batch.seq_lens[i] for i in batch.decode_seqs]
    table = batch.block_table[list(batch.decode_seqs), : _num_blocks(max(seq_lens), cache)]
    lens = torch.tensor(seq_lens, device=query.device)
    keys, values = _gather(cache, table)
    positions = torch.arange(keys.shape[1], device=query.device)
    visible = positions < lens[:, None]  # [D, L]
    for gathered in (keys, values):  # what a block's last owner left may be NaN, which no mask takes away
        gathered.masked_fill_(~visible[..., None, None], 0)
    if scores.window is not None:
        visible &= positions >= (lens - scores.window)[:, None]
    sinks = None if scores.sinks is None else scores.sinks[:, :, None]
    out = attend(
        query[:, :, None], keys, values, visible[:, None], scaling=scores.scaling, softcap=scores.softcap, sinks=sinks
    )
    return out[:, :, 0]


def _prefill(
    query: torch.Tensor, cache: Cache, batch: AttentionBatch, index: int, scores: ScoreOptions
) -> torch.Tensor:
    """One sequence with n query tokens, which stand at its end: `query [n, Hq, dim]` -> `[n, Hq, Dv]`."""
    seq_len = batch.seq_lens[index]
    keys, values = _gather(cache, batch.block_table[index : index + 1, : _num_blocks(seq_len, cache)])
    keys, values = keys[:, :seq_len], values[:, :seq_len]
    key_pos = torch.arange(seq_len, device=query.device)
    query_pos = key_pos[seq_len - len(query) :, None]
    visible = key_pos <= query_pos  # [n, L]
    if scores.window is not None:
        visible &= key_pos > query_pos - scores.window
    sinks = None if scores.sinks is None else scores.sinks.t()[None]  # [1, Hq, n]
    out = attend(
        query.transpose(0, 1)[None], keys, values, visible[None], scaling=scores.scaling, softcap=scores.softcap,
        sinks=sinks,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def span_attention(query: torch.Tensor, cache: Cache, spans: TokenSpans) -> torch.Tensor:
    """`Backend.span_attention`."""
    table, sequence, visible, start = spans.block_table, spans.sequence, spans.visible, spans.start
    if start is None:
        keys, values = _gather(cache, table[:, : _num_blocks(int(visible.max()), cache)][sequence])
        seen = torch.arange(keys.shape[1], device=keys.device) < visible[:, None]
        for gathered in (keys, values):
            gathered.masked_fill_(~seen[..., None, None], 0)
        return attend(query[:, :, None], keys, values, seen[:, None], scaling=1.0)[:, :, 0]
    assert spans.bias is not None
    # Past a token's own the last one again, whose bias is minus infinity there.
    offsets = torch.minimum(torch.arange(spans.bias.shape[2], device=query.device), (visible - start - 1)[:, None])
    positions, size = start[:, None] + offsets, cache[0].shape[1]  # [T, L]
    places = table[sequence[:, None], positions // size] * size + positions % size
    keys, values = (side.flatten(0, 1)[places].float() for side in cache)
    biased = torch.einsum("thd,tlhd->thl", query.float(), keys) + spans.bias
    return torch.einsum("thl,tlhd->thd", torch.softmax(biased, dim=-1), values).to(query.dtype)


def _num_blocks(tokens: int, cache: Cache) -> int:
    return -(-tokens // cache[0].shape[1])


def _gather(cache: Cache, block_table: torch.Tensor) -> Cache:
    """`block_table [B, M]` -> keys and values `[B, M * block_size, kv_heads, dim]`."""
    return cache[0][block_table].flatten(1, 2), cache[1][block_table].flatten(1, 2)


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
