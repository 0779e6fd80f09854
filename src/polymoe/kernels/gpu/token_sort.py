"""Table look-up and sort in one: the (token, expert) rows of a layer in the order in which the kernels read weights.

    base_r = table[variant of t, k-th expert of t],   delta_r, sign_r likewise;   rows sorted by (base, delta)

    |-------- base 0 --------|------- base 3 -------| …       row i is the (token, k) pair order[i]
    |-d −1-|--- d 4 ---|-d 7-|--- d −1 ---|-- d 2 --|         a segment has one base and one delta; each row a sign
    |- tile -|- tile -|-tile-|- tile -|- tile -|-tile |       at most `block_m` rows, never two bases; may cut segments

Letters: T tokens, K experts a token, S = T · K rows, V variants, E experts, P physical bases, N tiles. N is an upper
bound from shapes; tiles beyond those in use are empty (start = stop), so a grid of N programs fits every mix.

`sort_rows_torch` is the reference and what serves more than 2,048 rows; up to then kernels count ranks (a row's place
is the number of rows before it): one program for up to 256 rows, else S² comparisons spread over the device and a
second kernel for the tiles. Bytes moved: about 40 · S.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_ONE_PROGRAM = 256  # rows that one program sorts: then one launch does all
_MAX_COUNTED = 2048  # rows up to which counting beats torch's sort; the tile kernel is one program
_NO_DELTA = -1


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Sorted rows and their tiles, all on the device, all int32.

    order: `[S]`, row i is the (token, k) pair `order[i]` = token · K + k.
    delta, sign: `[S]` of each row, or None where no variant has a delta; delta −1 is none.
    segment_stop: `[S]`, where the segment of a row ends.
    tile_base, tile_start, tile_stop: `[N]`; base < 0 is an absent expert; an empty tile has start = stop = 0.
    """

    order: Tensor
    delta: Tensor | None
    sign: Tensor | None
    segment_stop: Tensor
    tile_base: Tensor
    tile_start: Tensor
    tile_stop: Tensor
    top_k: int
    block_m: int


def max_tiles(num_rows: int, block_m: int, num_bases: int) -> int:
    """Most tiles that `num_rows` rows over `num_bases` bases can need: Σ ⌈n_b / block_m⌉ with Σ n_b = `num_rows`."""
    return min(num_rows, num_rows // block_m + min(num_rows, num_bases))


def sort_rows(
    top_k_index: Tensor,
    token_variant: Tensor,
    table: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    block_m: int,
    num_bases: int,
) -> SortedRows:
    """Look up and sort without waiting for the device.

    Args:
        top_k_index: `[T, K]` routed experts, int32 or int64.
        token_variant: `[T]`, int32 or int64; < 0 is padding, whose rows count as absent.
        table: `[V, E]` int32, may be strided: physical base, < 0 absent.
        delta, sign: `[V, E]` like `table` (int32, int8), or None.
        block_m: rows of a tile.
        num_bases: how many different values the table holds at most, those of absent experts among them.
    """
    num_rows = top_k_index.numel()
    if num_rows > _MAX_COUNTED:
        return sort_rows_torch(top_k_index, token_variant, table, delta, sign, block_m, num_bases)
    assert top_k_index.ndim == 2
    assert token_variant.shape == top_k_index.shape[:1]
    assert delta is None or delta.stride() == table.stride(), "table and delta must have one layout"
    assert sign is None or sign.stride() == table.stride(), "table and sign must have one layout"
    top_k_index, token_variant = top_k_index.contiguous(), token_variant.contiguous()
    tiles = max_tiles(num_rows, block_m, num_bases + 1)  # and padding
    ints = torch.empty(7, num_rows, dtype=torch.int32, device=table.device)
    tile = torch.empty(3, tiles, dtype=torch.int32, device=table.device)
    order, row_delta, row_sign, segment_stop, *of_base = ints
    block_s, block_t = (max(16, triton.next_power_of_2(count)) for count in (num_rows, tiles))
    tensors = (
        top_k_index, token_variant, table, table if delta is None else delta, table if sign is None else sign,
        order, row_delta, row_sign, segment_stop,
    )  # fmt: skip
    numbers = (num_rows, top_k_index.shape[1], table.stride(0), table.stride(1))
    has = {"HAS_DELTA": delta is not None, "HAS_SIGN": sign is not None}
    if num_rows <= _MAX_ONE_PROGRAM:
        _whole_kernel[(1,)](
            *tensors, *tile, *numbers, tiles, block_m, **has, BLOCK_S=block_s, BLOCK_J=min(32, block_s),
            BLOCK_T=block_t, num_warps=4 if block_s <= 64 else 16,
        )  # fmt: skip
    else:
        _rank_kernel[(triton.cdiv(num_rows, 16),)](
            *tensors, *of_base, *numbers, **has, BLOCK_I=16, BLOCK_J=128, num_warps=4
        )
        _tile_kernel[(1,)](
            *of_base, *tile, num_rows, tiles, block_m, BLOCK_S=block_s, BLOCK_T=block_t,
            num_warps=4 if num_rows <= 512 else 8,
        )  # fmt: skip
    found = None if delta is None else row_delta
    signs = None if delta is None else row_sign
    return SortedRows(order, found, signs, segment_stop, tile[0], tile[1], tile[2], top_k_index.shape[1], block_m)


def sort_rows_torch(
    top_k_index: Tensor,
    token_variant: Tensor,
    table: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    block_m: int,
    num_bases: int,
) -> SortedRows:
    """The reference, in torch operations that do not wait for the device either. Arguments as `sort_rows`."""
    num_rows, top_k = top_k_index.numel(), top_k_index.shape[1]
    device = table.device
    padding = (token_variant < 0)[:, None]
    entry = token_variant.clamp_min(0).long()[:, None], top_k_index.long()
    base = torch.where(padding, -1, table[entry]).reshape(-1).long()
    row_delta = torch.full_like(base, _NO_DELTA)
    if delta is not None:
        row_delta = torch.where(padding, _NO_DELTA, delta[entry]).reshape(-1).long()
    key, order = torch.sort((base << 32) + (row_delta - _NO_DELTA), stable=True)
    base = base[order]
    base_start, base_stop = torch.searchsorted(base, base), torch.searchsorted(base, base, right=True)
    row = torch.arange(num_rows, device=device)
    is_first = (row - base_start) % block_m == 0
    tiles = max_tiles(num_rows, block_m, num_bases + 1)  # and padding
    # One place more takes what rows that begin no tile would write.
    place = torch.where(is_first, is_first.cumsum(0) - 1, tiles)
    stop = torch.minimum(row + block_m, base_stop)
    tile = torch.zeros(3, tiles + 1, dtype=torch.int32, device=device)
    for i, values in enumerate((base, row, stop)):
        tile[i].scatter_(0, place, values.int())
    signs = None
    if delta is not None:
        signs = torch.ones_like(base) if sign is None else sign[entry].reshape(-1)[order]
    return SortedRows(
        order.int(),
        None if delta is None else row_delta[order].int(),
        None if signs is None else signs.int(),
        torch.searchsorted(key, key, right=True).int(),
        tile[0, :tiles],
        tile[1, :tiles],
        tile[2, :tiles],
        top_k,
        block_m,
    )


@triton.jit
def _keys(
    rows, num_rows, top_k, index_ptr, variant_ptr, table_ptr, delta_ptr, stride_v, stride_e, HAS_DELTA: tl.constexpr
):  # fmt: skip
    """(entry of the tables, base, delta + 1) of unsorted rows; rows beyond the last sort after all others."""
    here = rows < num_rows
    expert = tl.load(index_ptr + rows, mask=here, other=0)
    variant = tl.load(variant_ptr + rows // top_k, mask=here, other=0)
    padding = variant < 0
    entry = tl.maximum(variant, 0).to(tl.int64) * stride_v + expert.to(tl.int64) * stride_e
    base = tl.where(padding, -1, tl.load(table_ptr + entry, mask=here, other=2147483647))
    delta = tl.full(base.shape, -1, tl.int32)
    if HAS_DELTA:
        delta = tl.where(padding, -1, tl.load(delta_ptr + entry, mask=here, other=0))
    return entry, base, delta


@triton.jit
def _ranks(
    i, num_rows, top_k, index_ptr, variant_ptr, table_ptr, delta_ptr, sign_ptr, stride_v, stride_e,
    order_ptr, row_delta_ptr, row_sign_ptr, segment_stop_ptr,
    HAS_DELTA: tl.constexpr, HAS_SIGN: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Rows `i`: count the rows that come before each, and write what belongs to it at its place.

    Returns: base, place, and where the rows of its base start and stop.
    """
    here = i < num_rows
    entry, base, delta = _keys(
        i, num_rows, top_k, index_ptr, variant_ptr, table_ptr, delta_ptr, stride_v, stride_e, HAS_DELTA
    )
    rank = tl.zeros(i.shape, tl.int32)
    base_start = tl.zeros(i.shape, tl.int32)
    base_stop = tl.zeros(i.shape, tl.int32)
    segment_stop = tl.zeros(i.shape, tl.int32)
    for j0 in range(0, num_rows, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        _, other_base, other_delta = _keys(
            j, num_rows, top_k, index_ptr, variant_ptr, table_ptr, delta_ptr, stride_v, stride_e, HAS_DELTA
        )
        valid = (j < num_rows)[None, :]
        lower = (other_base[None, :] < base[:, None]) & valid
        same_base = (other_base[None, :] == base[:, None]) & valid
        before = lower | (same_base & (other_delta[None, :] < delta[:, None]))
        same = same_base & (other_delta[None, :] == delta[:, None])
        earlier = same & (j[None, :] < i[:, None])
        base_start += tl.sum(lower.to(tl.int32), axis=1)
        base_stop += tl.sum((lower | same_base).to(tl.int32), axis=1)
        rank += tl.sum((before | earlier).to(tl.int32), axis=1)
        segment_stop += tl.sum((before | same).to(tl.int32), axis=1)
    tl.store(order_ptr + rank, i, mask=here)
    tl.store(segment_stop_ptr + rank, segment_stop, mask=here)
    if HAS_DELTA:
        tl.store(row_delta_ptr + rank, delta, mask=here)
        sign = tl.full(i.shape, 1, tl.int32)
        if HAS_SIGN:
            sign = tl.load(sign_ptr + entry, mask=here, other=1).to(tl.int32)
        tl.store(row_sign_ptr + rank, sign, mask=here)
    return base, rank, base_start, base_stop


@triton.jit
def _clear_tiles(tile_base_ptr, tile_start_ptr, tile_stop_ptr, used, num_tiles, BLOCK_T: tl.constexpr):
    tile = tl.arange(0, BLOCK_T)
    empty = (tile >= used) & (tile < num_tiles)
    zero = tl.zeros((BLOCK_T,), tl.int32)
    tl.store(tile_base_ptr + tile, zero, mask=empty)
    tl.store(tile_start_ptr + tile, zero, mask=empty)
    tl.store(tile_stop_ptr + tile, zero, mask=empty)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _whole_kernel(
    index_ptr, variant_ptr, table_ptr, delta_ptr, sign_ptr,
    order_ptr, row_delta_ptr, row_sign_ptr, segment_stop_ptr, tile_base_ptr, tile_start_ptr, tile_stop_ptr,
    num_rows, top_k, stride_v, stride_e, num_tiles, block_m,
    HAS_DELTA: tl.constexpr, HAS_SIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Few rows: one program sorts them and numbers the tiles, by counting those that begin before."""
    i = tl.arange(0, BLOCK_S)
    base, rank, base_start, base_stop = _ranks(
        i, num_rows, top_k, index_ptr, variant_ptr, table_ptr, delta_ptr, sign_ptr, stride_v, stride_e,
        order_ptr, row_delta_ptr, row_sign_ptr, segment_stop_ptr, HAS_DELTA, HAS_SIGN, BLOCK_J,
    )  # fmt: skip
    first = (i < num_rows) & ((rank - base_start) % block_m == 0)
    begins_before = (rank[None, :] < rank[:, None]) & first[None, :]
    place = tl.sum(begins_before.to(tl.int32), axis=1)
    first = first & (place < num_tiles)  # never beyond the table, should it hold more bases than was said
    tl.store(tile_base_ptr + place, base, mask=first)
    tl.store(tile_start_ptr + place, rank, mask=first)
    tl.store(tile_stop_ptr + place, tl.minimum(rank + block_m, base_stop), mask=first)
    _clear_tiles(tile_base_ptr, tile_start_ptr, tile_stop_ptr, tl.sum(first.to(tl.int32), 0), num_tiles, BLOCK_T)


@triton.jit(do_not_specialize=["num_rows"])
def _rank_kernel(
    index_ptr, variant_ptr, table_ptr, delta_ptr, sign_ptr,
    order_ptr, row_delta_ptr, row_sign_ptr, segment_stop_ptr, base_ptr, base_start_ptr, base_stop_ptr,
    num_rows, top_k, stride_v, stride_e,
    HAS_DELTA: tl.constexpr, HAS_SIGN: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """More rows: `BLOCK_I` of them; `_tile_kernel` goes on."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    base, rank, base_start, base_stop = _ranks(
        i, num_rows, top_k, index_ptr, variant_ptr, table_ptr, delta_ptr, sign_ptr, stride_v, stride_e,
        order_ptr, row_delta_ptr, row_sign_ptr, segment_stop_ptr, HAS_DELTA, HAS_SIGN, BLOCK_J,
    )  # fmt: skip
    here = i < num_rows
    tl.store(base_ptr + rank, base, mask=here)
    tl.store(base_start_ptr + rank, base_start, mask=here)
    tl.store(base_stop_ptr + rank, base_stop, mask=here)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _tile_kernel(
    base_ptr, base_start_ptr, base_stop_ptr, tile_base_ptr, tile_start_ptr, tile_stop_ptr,
    num_rows, num_tiles, block_m, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: number the rows that begin a tile; the tiles behind the last one are empty."""
    row = tl.arange(0, BLOCK_S)
    here = row < num_rows
    base = tl.load(base_ptr + row, mask=here, other=0)
    base_start = tl.load(base_start_ptr + row, mask=here, other=0)
    base_stop = tl.load(base_stop_ptr + row, mask=here, other=0)
    first = here & ((row - base_start) % block_m == 0)
    place = tl.cumsum(first.to(tl.int32), 0) - 1
    used = tl.sum(first.to(tl.int32), 0)
    first = first & (place < num_tiles)  # never beyond the table, should it hold more bases than was said
    tl.store(tile_base_ptr + place, base, mask=first)
    tl.store(tile_start_ptr + place, row, mask=first)
    tl.store(tile_stop_ptr + place, tl.minimum(row + block_m, base_stop), mask=first)
    _clear_tiles(tile_base_ptr, tile_start_ptr, tile_stop_ptr, used, num_tiles, BLOCK_T)
