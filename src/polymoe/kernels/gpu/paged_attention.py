"""Attention over the paged cache on a GPU: prefill and decode in one call, causal at each sequence's end.

    o_t = softmax(cap(scaling · q_t Kᵀ), sink) V   over the keys that t sees: its position and before, within the window

    sequence i:  |------------ computed earlier ------------|---- query ----|    seq_lens[i] keys in all
                 keys and values in blocks block_table[i]    rows query_start_loc[i] : query_start_loc[i + 1]

Letters: T tokens, B sequences, M blocks a sequence at most, Hq query heads, Hk key heads, D and Dv head sizes. A
program takes some tokens and all query heads of one key head, so keys are read once for the group, in blocks with the
online softmax (FlashAttention-2, arXiv 2307.08691). In decode the keys of a sequence are split over programs, and a
second kernel joins the parts (flash-decoding), else one long sequence would keep few multiprocessors busy.

Bytes moved in decode: Σ seq_lens · Hk · (D + Dv) of the cache, or the window's; with splits twice T · Hq · Dv float32.
"""

from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels.gpu.autotune import Config, choose, row_bucket, typical_decode

_SPLIT_KEYS = 128  # fewest keys worth a program of their own
_MAX_SPLITS = 32
_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED_PROGRAMS = 16  # what stands for a GPU's multiprocessors where there is none


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one layer for the flattened batch, without waiting for the device.

    Args:
        query: `[T, Hq, D]`, any strides with the last axis contiguous.
        key, value: the layer's cache, `[blocks, block_size, Hk, D]` and `[…, Dv]`, last axis contiguous. What the
            queries' own tokens bring must be written already. Places no sequence has may hold anything, NaN too.
        block_table: `[B, M]` int32 or int64; entries beyond a sequence's blocks are not read.
        query_start_loc: `[B + 1]`, seq_lens: `[B]`, int32, both on the device. A sequence may have no query rows;
            one of length 0 gets zeros.
        max_query_len: no sequence has more query rows; 1 is decode.
        window: a token sees only the last `window` keys, its own among them. softcap: scores become
            `softcap · tanh(score / softcap)`. sinks: `[Hq]` or `[T, Hq]`, scores that take probability, give nothing.

    Returns: `[T, Hq, Dv]` in the query's dtype.
    """
    _check(query, key, value, block_table, query_start_loc, seq_lens, sinks)
    tokens, q_heads, dim = query.shape
    block_size, kv_heads, value_dim = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty(tokens, q_heads, value_dim)
    if tokens == 0:
        return out
    batch = len(seq_lens)
    group = triton.next_power_of_2(q_heads // kv_heads)
    widest = max(triton.next_power_of_2(dim), triton.next_power_of_2(value_dim), 16)
    block_m = max(16, group) if max_query_len == 1 else max(group, 16, min(128, 16384 // widest))
    block_q = block_m // group
    tiles = batch if max_query_len == 1 else min(tokens, tokens // block_q + batch)
    splits = _num_splits(query, batch * kv_heads, block_table.shape[1] * block_size) if max_query_len == 1 else 1
    part = (
        torch.empty(splits, tokens, q_heads, value_dim, dtype=torch.float32, device=query.device) if splits > 1 else out
    )
    # of each part: the largest score, and Σ 2^(score − largest)
    largest, total = torch.empty(2, splits, tokens, q_heads, dtype=torch.float32, device=query.device)
    sink_strides = (0, 0) if sinks is None else (0, sinks.stride(0)) if sinks.ndim == 1 else sinks.stride()

    def launch(config: Config, table: Tensor = block_table, lens: Tensor = seq_lens) -> None:
        _attention_kernel[(tiles, kv_heads, splits)](
            query, key, value, query if sinks is None else sinks, table, query_start_loc, lens,
            part, largest, total, batch, tokens, scaling, softcap or 0.0,
            query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], table.stride(0),
            *sink_strides,
            WINDOW=window or 0, SOFTCAP=softcap is not None, SINKS=sinks is not None, BLOCK_SIZE=block_size,
            HEADS=q_heads, HEADS_A_KEY=q_heads // kv_heads, GROUP=group, DIM=dim, VALUE_DIM=value_dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
            ONE_QUERY=max_query_len == 1, BATCH=triton.next_power_of_2(batch), SPLITS=splits,
            BLOCK_M=block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    shape = (query.dtype, q_heads, kv_heads, dim, value_dim, block_size, window, block_m, row_bucket(tiles), splits)
    typical = cache(partial(typical_decode, key, block_table, seq_lens))
    timed = launch if max_query_len > 1 else lambda config: launch(config, *typical())
    launch(choose("paged_attention", shape, _configs(block_m, widest), timed))
    if splits > 1:
        _join_kernel[(tokens, q_heads)](
            part, largest, total, query if sinks is None else sinks, out, tokens, *sink_strides,
            SINKS=sinks is not None, HEADS=q_heads, VALUE_DIM=value_dim, SPLITS=splits,
            BLOCK_V=max(16, triton.next_power_of_2(value_dim)), num_warps=4,
        )  # fmt: skip
    return out


def paged_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The reference, in float32, a sequence at a time. Arguments as `paged_attention`."""
    _check(query, key, value, block_table, query_start_loc, seq_lens, sinks)
    tokens, q_heads, _ = query.shape
    repeat = q_heads // key.shape[2]
    out = torch.zeros(tokens, q_heads, value.shape[3], device=query.device)
    bounds = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        start, stop = bounds[i], bounds[i + 1]
        assert stop - start <= max_query_len
        if length == 0:
            continue
        blocks = block_table[i, : -(-length // key.shape[1])].long()
        keys, values = (t[blocks].flatten(0, 1)[:length].float().repeat_interleave(repeat, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start:stop].float(), keys) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        key_pos = torch.arange(length, device=query.device)
        query_pos = length - (stop - start) + torch.arange(stop - start, device=query.device)[:, None]
        visible = (key_pos <= query_pos) & (key_pos > query_pos - (window or length))
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            own = sinks.expand(tokens, q_heads)[start:stop].float().t()[:, :, None]
            scores = torch.cat([scores, own], dim=-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values)
    return out.to(query.dtype)


def _check(
    query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    assert query.shape[2] == key.shape[3]
    assert key.shape[:3] == value.shape[:3]
    assert query.shape[1] % key.shape[2] == 0
    assert query.stride(2) == key.stride(3) == value.stride(3) == 1
    assert block_table.shape[0] == len(seq_lens) == len(query_start_loc) - 1
    assert block_table.stride(1) == 1
    assert sinks is None or sinks.shape in ((query.shape[1],), query.shape[:2])


def _num_splits(query: Tensor, programs: int, max_keys: int) -> int:
    """A power of two that fills the device about twice, from what shapes tell."""
    if query.is_cuda:
        wanted = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count
    else:
        wanted = _INTERPRETED_PROGRAMS
    most = min(_MAX_SPLITS, max_keys // _SPLIT_KEYS, wanted // programs)
    return 1 << (max(1, most).bit_length() - 1)


def _configs(block_m: int, widest: int) -> tuple[Config, ...]:
    """Candidates; a step is `block_n` keys."""
    if widest > 256:
        return (Config(16, 0, 4, 2), Config(32, 0, 4, 2), Config(32, 0, 8, 2))
    if widest > 128:
        return (Config(32, 0, 4, 2), Config(64, 0, 8, 2), Config(32, 0, 8, 3))
    if block_m <= 32:
        return (Config(64, 0, 4, 5), Config(128, 0, 4, 5), Config(32, 0, 4, 7), Config(64, 0, 4, 3))
    return (Config(64, 0, 8, 3), Config(64, 0, 4, 3), Config(128, 0, 8, 2), Config(64, 0, 8, 2))


@triton.jit(do_not_specialize=["batch", "tokens"])
def _attention_kernel(
    query_ptr, key_ptr, value_ptr, sink_ptr, block_table_ptr, query_start_ptr, seq_len_ptr,
    out_ptr, largest_ptr, total_ptr, batch, tokens, scaling, softcap,
    query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h, table_b, sink_t, sink_h,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    HEADS_A_KEY: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ONE_QUERY: tl.constexpr, BATCH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of a program: BLOCK_M / GROUP tokens of one sequence, each with the query heads of one key head."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if ONE_QUERY:
        sequence = tile
        first = 0
    else:
        i = tl.arange(0, BATCH)
        starts = tl.load(query_start_ptr + i, mask=i < batch, other=0)
        stops = tl.load(query_start_ptr + i + 1, mask=i < batch, other=0)
        tiles_of = (stops - starts + BLOCK_Q - 1) // BLOCK_Q
        tiles_up_to = tl.cumsum(tiles_of, 0)
        if tile >= tl.sum(tiles_of, 0):
            return
        sequence = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)
        first = tl.sum(tl.where(i == sequence, tile - (tiles_up_to - tiles_of), 0), 0) * BLOCK_Q
    query_start = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - query_start
    if first >= query_len:
        return
    seq_len = tl.load(seq_len_ptr + sequence)

    m = tl.arange(0, BLOCK_M)
    q = first + m // GROUP  # the query's number in its sequence
    head = kv_head * HEADS_A_KEY + m % GROUP
    row_ok = (q < query_len) & (m % GROUP < HEADS_A_KEY)
    position = seq_len - query_len + q
    token = (query_start + q).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    query = tl.load(
        query_ptr + token[:, None] * query_t + head[:, None] * query_h + d[None, :],
        mask=row_ok[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip

    # keys that some row sees: [low, high), cut into splits of whole steps
    high = tl.minimum(seq_len, seq_len - query_len + first + BLOCK_Q)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(seq_len - query_len + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        per_split: tl.constexpr = BLOCK_N * SPLITS
        steps = (tl.maximum(high - low, 0) + per_split - 1) // per_split
        low += split * steps * BLOCK_N
        high = tl.minimum(high, low + steps * BLOCK_N)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    table = block_table_ptr + sequence.to(tl.int64) * table_b
    for n0 in range(low, high, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < high
        cache_block = tl.load(table + n // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        place = n % BLOCK_SIZE
        keys = tl.load(
            key_ptr + (cache_block * key_b + place * key_s + kv_head * key_h)[None, :] + d[:, None],
            mask=inside[None, :] & (d < DIM)[:, None], other=0.0,
        )  # fmt: skip
        scores = tl.dot(query, keys, input_precision="ieee") * scaling
        if SOFTCAP:
            doubled = tl.exp(2.0 * scores / softcap)  # tanh x = 1 − 2 / (e²ˣ + 1), for ±∞ too
            scores = softcap * (1.0 - 2.0 / (doubled + 1.0))
        visible = inside[None, :] & (n[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (n[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores * _LOG2_E, float("-inf"))
        following = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(following == float("-inf"), 0.0, following)  # a row that has seen no key yet
        weight = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weight, 1)
        values = tl.load(
            value_ptr + (cache_block * value_b + place * value_s + kv_head * value_h)[:, None] + v[None, :],
            mask=inside[:, None] & (v < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(weight.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        largest = following

    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sink_ptr + token * sink_t + head * sink_h, mask=row_ok, other=0.0).to(tl.float32) * _LOG2_E
            following = tl.maximum(largest, sink)
            shrink = tl.exp2(largest - following)
            total = total * shrink + tl.exp2(sink - following)
            acc = acc * shrink[:, None]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        row = token * HEADS + head
    else:
        row = (split.to(tl.int64) * tokens + token) * HEADS + head
        tl.store(largest_ptr + row, largest, mask=row_ok)
        tl.store(total_ptr + row, total, mask=row_ok)
    tl.store(
        out_ptr + row[:, None] * VALUE_DIM + v[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (v < VALUE_DIM)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _join_kernel(
    part_ptr, largest_ptr, total_ptr, sink_ptr, out_ptr, tokens, sink_t, sink_h,
    SINKS: tl.constexpr, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token and head: its parts, each with its own largest score, and the sink."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    v = tl.arange(0, BLOCK_V)
    row = (split.to(tl.int64) * tokens + token) * HEADS + head
    largest = tl.load(largest_ptr + row)
    total = tl.load(total_ptr + row)
    overall = tl.max(largest, 0)
    sink = 0.0
    if SINKS:
        sink = tl.load(sink_ptr + token * sink_t + head * sink_h).to(tl.float32) * _LOG2_E
        overall = tl.maximum(overall, sink)
    safe = tl.where(overall == float("-inf"), 0.0, overall)
    shrink = tl.exp2(largest - safe)
    divisor = tl.sum(total * shrink, 0)
    if SINKS:
        divisor += tl.exp2(sink - safe)
    parts = tl.load(part_ptr + row[:, None] * VALUE_DIM + v[None, :], mask=(v < VALUE_DIM)[None, :], other=0.0)
    joined = tl.sum(parts * shrink[:, None], 0) / tl.where(divisor == 0.0, 1.0, divisor)
    out = out_ptr + (token * HEADS + head) * VALUE_DIM + v
    tl.store(out, joined.to(out_ptr.dtype.element_ty), mask=v < VALUE_DIM)
