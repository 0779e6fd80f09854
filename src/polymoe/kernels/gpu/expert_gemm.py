"""Grouped GEMM over pools of experts: stored or packed bases, with k-bit deltas in the same kernel.

    z_r = (B_b(r) + s_r Δ_d(r)) x_r + c_b(r) + s_r e_d(r)                  sums in float32
    gate_up:  h_r = silu(gate half of z_r) ∘ (up half)                     one rounding, to x's dtype
    down:     y_r = g_r z_r                                                float32, written to row `order[r]`
    linear:   z_r itself                                                   float32

A program computes one tile of at most `block_m` rows that share a base (`token_sort`), for BN weight rows. It reads
the base once for all rows, whatever their variants, then for each segment of one delta that delta for its rows: all
variants on a base share its bytes, and a delta costs its own. Nothing is written between the two products. Layers with
deltas in several formats take one more pass a format, which adds to what the first wrote.

    acc [BM, BN]:  |x rows of v. 0| · Bᵀ  +  |x rows of v. 0| · Δ₀ᵀ  +  |      0       | · Δ₁ᵀ
                   |x rows of v. 1|          |      0       |           |x rows of v. 1|

Gate and up rows alternate in a tile (column 2 n is gate n, 2 n + 1 up n), so both halves meet in one thread.
Programs are numbered so that those at work at one time share weights or rows in the L2 cache: `_TILES_TOGETHER` tiles
for one block of columns, then the next block.

Bytes moved: each base touched once (once a tile if a base has several and the L2 cache does not hold it), each
(base, delta) touched once, S · I of x a block of columns from the L2 cache, S · O written (float32 for `down`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels.gpu.autotune import Config, choose, row_bucket
from polymoe.kernels.gpu.exact_product import exact_product
from polymoe.kernels.gpu.packed_product import EXACT, STORED, packed_product, stored_product
from polymoe.kernels.gpu.pool_matrix import CONSTANTS, PoolMatrix, lanes
from polymoe.kernels.gpu.token_sort import SortedRows

LINEAR = tl.constexpr(0)
GATED = tl.constexpr(1)
WEIGHTED = tl.constexpr(2)
NONE = tl.constexpr(-1)  # no base, or no delta, in this launch

_TILES_TOGETHER = 8
# block_m -> candidates for stored weights alone, and where something is packed. The first is used where nothing is
# timed. A tile is block_m by block_n, in steps of block_k inputs.
_STORED = {
    16: (
        Config(64, 128, 4, 4), Config(128, 128, 4, 3), Config(128, 64, 4, 4), Config(64, 256, 4, 3),
        Config(32, 256, 4, 4), Config(128, 128, 8, 4),
    ),
    32: (Config(64, 128, 4, 4), Config(128, 128, 4, 3), Config(128, 64, 4, 4), Config(128, 128, 8, 4)),
    64: (Config(128, 64, 4, 3), Config(256, 64, 8, 3), Config(128, 128, 8, 3), Config(64, 128, 4, 3)),
    128: (Config(128, 64, 8, 3), Config(256, 64, 8, 3), Config(256, 64, 8, 4), Config(128, 64, 4, 4)),
}  # fmt: skip
_PACKED = {
    16: (Config(64, 256, 4, 3), Config(64, 256, 4, 4), Config(32, 256, 4, 4), Config(128, 256, 8, 4)),
    32: (Config(64, 256, 4, 2), Config(64, 256, 4, 3), Config(32, 256, 4, 4), Config(128, 256, 8, 3)),
    64: (Config(64, 128, 4, 2), Config(64, 128, 4, 3), Config(128, 256, 8, 2), Config(128, 128, 8, 3)),
    128: (Config(64, 128, 8, 2), Config(128, 256, 8, 2), Config(64, 256, 8, 2), Config(64, 128, 8, 3)),
}


def block_m_for(num_rows: int, num_bases: int) -> int:
    """Rows of a tile: the power of two that holds what a base gets when the rows are spread evenly."""
    mean = num_rows / max(1, min(num_rows, num_bases))
    return next((size for size in (16, 32, 64) if mean <= size * 0.75), 128)


def expert_gemm(
    kind: int,
    x: Tensor,
    rows: SortedRows,
    base: PoolMatrix | None,
    delta: PoolMatrix | None,
    out: Tensor,
    routing_weight: Tensor | None = None,
    *,
    add: bool = False,
    zero_absent: bool = False,
) -> None:
    """One pass over one pool of bases and one of deltas; rows of other bases stay as they are in `out`.

    Args:
        kind: `LINEAR.value`, `GATED.value` or `WEIGHTED.value`, see the module docstring.
        x: `[T, I]` by token for LINEAR and GATED, `[S, I]` sorted for WEIGHTED; the last axis contiguous.
        rows: from `sort_rows`; its `block_m` decides the tiles.
        base: weights `[P, O, I]`. None: only the delta's product, on any base that is not absent (with `add`).
        delta: likewise, or lossless ones with a stored `base`; None: no deltas in this pass.
        out: float32 `[S, O]` sorted (LINEAR) or by (token, k) (WEIGHTED); `[S, O / 2]` sorted, in x's dtype (GATED).
        routing_weight: `[T, K]` contiguous, for WEIGHTED.
        add: add to what is in `out` (not with GATED).
        zero_absent: with WEIGHTED, set the rows of absent experts to zero.
    """
    matrix = base or delta
    assert matrix is not None
    _check(kind, x, rows, base, delta, out, routing_weight, add)
    tiles = rows.tile_base.shape[0]

    def launch(config: Config, target: Tensor = out) -> None:
        blocks = triton.cdiv(matrix.outputs, config.block_n)
        _kernel[(tiles * blocks,)](
            x, target, x if routing_weight is None else routing_weight,
            rows.order, rows.segment_stop, *(x if t is None else t for t in (rows.delta, rows.sign)),
            rows.tile_base, rows.tile_start, rows.tile_stop, *_arguments(base, x), *_arguments(delta, x),
            tiles, x.stride(0), out.stride(0),
            INPUTS=matrix.inputs, OUTPUTS=matrix.outputs, TOP_K=rows.top_k, EPILOGUE=kind, ADD=add,
            ZERO_ABSENT=zero_absent, TOGETHER=_TILES_TOGETHER, **_constants("BASE", base, config.block_k),
            **_constants("DELTA", delta, config.block_k), BLOCK_M=rows.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    formats = ["none" if m is None else m.format.name for m in (base, delta)]
    unpacked = base is not None and not any(m is not None and m.format.is_coded for m in (base, delta))
    shape = (x.dtype, kind, add, *formats, matrix.outputs, matrix.inputs, rows.block_m, row_bucket(len(rows.order)))
    candidates = (_STORED if unpacked else _PACKED)[rows.block_m]
    launch(choose("expert_gemm", shape, candidates, lambda config: launch(config, out.clone() if add else out)))


def expert_gemm_torch(
    kind: int,
    x: Tensor,
    rows: SortedRows,
    base: PoolMatrix | None,
    delta: PoolMatrix | None,
    out: Tensor,
    routing_weight: Tensor | None = None,
    *,
    add: bool = False,
    zero_absent: bool = False,
) -> None:
    """The reference, row by row in float32. Arguments as `expert_gemm`."""
    _check(kind, x, rows, base, delta, out, routing_weight, add)
    for tile_base, start, stop in torch.stack([rows.tile_base, rows.tile_start, rows.tile_stop], 1).tolist():
        for r in range(start, stop):
            pair = int(rows.order[r])
            place = pair if kind == WEIGHTED.value else r
            if zero_absent and tile_base < 0:
                out[place] = 0
            if tile_base < 0 or (base is not None and tile_base not in base):
                continue
            row = x[r if kind == WEIGHTED.value else pair // rows.top_k].float()
            z = torch.zeros((), device=x.device) if base is None else base.product(tile_base, row)
            if delta is not None and rows.delta is not None and rows.sign is not None and int(rows.delta[r]) in delta:
                own = int(rows.delta[r])
                if delta.format.is_lossless and base is not None:
                    z = z + delta.changes(own, base, tile_base) @ row
                else:
                    z = z + rows.sign[r] * delta.product(own, row)
            if kind == GATED.value:
                gate, up = z.chunk(2)
                z = torch.nn.functional.silu(gate) * up
            elif routing_weight is not None:
                z = z * routing_weight.reshape(-1)[pair]
            out[place] = out[place] + z if add else z.to(out.dtype)


def _check(
    kind: int, x: Tensor, rows: SortedRows, base: PoolMatrix | None, delta: PoolMatrix | None, out: Tensor,
    routing_weight: Tensor | None, add: bool,
) -> None:  # fmt: skip
    num_rows = len(rows.order)
    assert x.stride(1) == 1
    assert out.stride(1) == 1
    assert kind in (LINEAR.value, GATED.value, WEIGHTED.value)
    assert x.shape[0] * (1 if kind == WEIGHTED.value else rows.top_k) == num_rows, "rows of x do not fit the routing"
    for matrix in (base, delta):
        if matrix is not None:
            assert x.shape[1] == matrix.inputs
            assert out.shape == (num_rows, matrix.outputs // (2 if kind == GATED.value else 1))
    assert kind != GATED.value or not add
    assert kind == GATED.value or out.dtype == torch.float32
    assert (kind == WEIGHTED.value) == (routing_weight is not None)
    assert routing_weight is None or routing_weight.is_contiguous()
    assert delta is None or rows.delta is not None, "deltas without a delta table"
    exact = delta is not None and delta.format.is_lossless
    assert not exact or (base is not None and not base.format.is_packed), "lossless deltas are against a stored base"


def _arguments(matrix: PoolMatrix | None, nothing: Tensor) -> tuple[Any, ...]:
    """values, scales, levels, bias, first id, the id behind the last, and for a matrix that is not there `nothing`."""
    if matrix is None:
        return (nothing,) * 4 + (0, 0)
    tensors = (matrix.values, matrix.scales, matrix.levels, matrix.bias)
    return (*(nothing if t is None else t for t in tensors), matrix.first, matrix.first + matrix.count)


def _constants(prefix: str, matrix: PoolMatrix | None, block_k: int) -> dict[str, Any]:
    own: dict[str, Any] = dict.fromkeys((*CONSTANTS, "LANES", "ROW", "GROUPS", "BIAS"), NONE.value)
    if matrix is not None:
        own = {
            **matrix.constants,
            "LANES": 0 if not matrix.format.is_coded else lanes(matrix.constants, matrix.inputs, block_k),
            "ROW": matrix.values.shape[2],
            "GROUPS": 0 if matrix.scales is None else matrix.scales.shape[2],
            "BIAS": matrix.bias is not None,
        }
    return {f"{prefix}_{name}": value for name, value in own.items()}


@triton.jit(do_not_specialize=["base_first", "base_end", "delta_first", "delta_end", "num_tiles"])
def _kernel(
    x_ptr, out_ptr, routing_weight_ptr, order_ptr, segment_stop_ptr, row_delta_ptr, row_sign_ptr,
    tile_base_ptr, tile_start_ptr, tile_stop_ptr,
    base_ptr, base_scale_ptr, base_level_ptr, base_bias_ptr, base_first, base_end,
    delta_ptr, delta_scale_ptr, delta_level_ptr, delta_bias_ptr, delta_first, delta_end,
    num_tiles, stride_x, stride_out,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, TOP_K: tl.constexpr, EPILOGUE: tl.constexpr, ADD: tl.constexpr,
    ZERO_ABSENT: tl.constexpr, TOGETHER: tl.constexpr,
    BASE_KIND: tl.constexpr, BASE_WIDE: tl.constexpr, BASE_NARROW: tl.constexpr, BASE_GROUP: tl.constexpr,
    BASE_LANES: tl.constexpr, BASE_LOW: tl.constexpr, BASE_HIGH: tl.constexpr,
    BASE_STEP0: tl.constexpr, BASE_STEP1: tl.constexpr, BASE_STEP2: tl.constexpr, BASE_STEP3: tl.constexpr,
    BASE_ROW: tl.constexpr, BASE_GROUPS: tl.constexpr, BASE_BIAS: tl.constexpr,
    DELTA_KIND: tl.constexpr, DELTA_WIDE: tl.constexpr, DELTA_NARROW: tl.constexpr, DELTA_GROUP: tl.constexpr,
    DELTA_LANES: tl.constexpr, DELTA_LOW: tl.constexpr, DELTA_HIGH: tl.constexpr,
    DELTA_STEP0: tl.constexpr, DELTA_STEP1: tl.constexpr, DELTA_STEP2: tl.constexpr, DELTA_STEP3: tl.constexpr,
    DELTA_ROW: tl.constexpr, DELTA_GROUPS: tl.constexpr, DELTA_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one block of weight rows; see the module docstring."""
    blocks: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first_tile = pid // (TOGETHER * blocks) * TOGETHER
    together = tl.minimum(num_tiles - first_tile, TOGETHER)
    within = pid % (TOGETHER * blocks)
    tile = first_tile + within % together
    block = within // together

    start = tl.load(tile_start_ptr + tile)
    stop = tl.load(tile_stop_ptr + tile)
    if start >= stop:
        return
    base = tl.load(tile_base_ptr + tile)
    column = tl.arange(0, BLOCK_N)
    row = start + tl.arange(0, BLOCK_M)
    row_ok = row < stop
    row = tl.minimum(row, stop - 1)
    pair = tl.load(order_ptr + row)
    if EPILOGUE == WEIGHTED:
        x_row = row
        out_row = pair
    else:
        x_row = pair // TOP_K
        out_row = row
    if EPILOGUE == GATED:
        HALF: tl.constexpr = OUTPUTS // 2
        out_column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_ok = row_ok[:, None] & (out_column < HALF)[None, :]
        weight_row = column % 2 * HALF + (block * (BLOCK_N // 2) + column // 2) % HALF
    else:
        out_column = block * BLOCK_N + column
        out_ok = row_ok[:, None] & (out_column < OUTPUTS)[None, :]
        weight_row = out_column % OUTPUTS
    out = out_ptr + out_row.to(tl.int64)[:, None] * stride_out + out_column[None, :]
    if ZERO_ABSENT:  # noqa: SIM102  (one is known to the compiler)
        if base < 0:
            tl.store(out, tl.zeros(out.shape, tl.float32), mask=out_ok)
            return
    if BASE_KIND == NONE:
        if base < 0:
            return
    else:
        if (base < base_first) | (base >= base_end):
            return

    x_rows = x_ptr + x_row.to(tl.int64) * stride_x
    wide_row = weight_row.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ones = tl.full((BLOCK_M,), 1.0, tl.float32)
    if BASE_KIND != NONE:
        at = (base - base_first).to(tl.int64) * OUTPUTS + wide_row
        if BASE_KIND == STORED:
            acc = stored_product(acc, x_rows, row_ok, base_ptr + at * BASE_ROW, INPUTS, BLOCK_M, BLOCK_K)
        else:
            acc = packed_product(
                acc, x_rows, row_ok, ones, base_ptr + at * BASE_ROW, base_scale_ptr + at * BASE_GROUPS, base_level_ptr,
                INPUTS, BASE_KIND, BASE_WIDE, BASE_NARROW, BASE_GROUP, BASE_LANES, BASE_LOW, BASE_HIGH,
                BASE_STEP0, BASE_STEP1, BASE_STEP2, BASE_STEP3, False,
            )  # fmt: skip
        if BASE_BIAS:
            acc += tl.load(base_bias_ptr + at).to(tl.float32)[None, :]

    if DELTA_KIND != NONE:
        sign = tl.load(row_sign_ptr + row).to(tl.float32)
        segment = start
        while segment < stop:
            delta = tl.load(row_delta_ptr + segment)
            following = tl.minimum(tl.load(segment_stop_ptr + segment), stop)
            if (delta >= delta_first) & (delta < delta_end):
                at = (delta - delta_first).to(tl.int64) * OUTPUTS + wide_row
                mine = row_ok & (row >= segment) & (row < following)
                if DELTA_KIND == EXACT:
                    base_row = (base - base_first).to(tl.int64) * OUTPUTS + wide_row
                    acc = exact_product(
                        acc, x_rows, mine, delta_ptr + at * DELTA_ROW, tl.load(delta_scale_ptr + at), delta_level_ptr,
                        base_ptr + base_row * BASE_ROW, INPUTS, BLOCK_K,
                    )  # fmt: skip
                else:
                    acc = packed_product(
                        acc, x_rows, mine, sign, delta_ptr + at * DELTA_ROW, delta_scale_ptr + at * DELTA_GROUPS,
                        delta_level_ptr, INPUTS, DELTA_KIND, DELTA_WIDE, DELTA_NARROW, DELTA_GROUP, DELTA_LANES,
                        DELTA_LOW, DELTA_HIGH, DELTA_STEP0, DELTA_STEP1, DELTA_STEP2, DELTA_STEP3, True,
                    )  # fmt: skip
                if DELTA_BIAS:
                    own = tl.where(mine, sign, 0.0)
                    acc += own[:, None] * tl.load(delta_bias_ptr + at)[None, :]
            segment = following

    if EPILOGUE == GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    if EPILOGUE == WEIGHTED:
        acc *= tl.load(routing_weight_ptr + pair).to(tl.float32)[:, None]
    if ADD:
        acc += tl.load(out, mask=out_ok, other=0.0)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=out_ok)
