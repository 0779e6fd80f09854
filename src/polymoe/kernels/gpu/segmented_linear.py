"""Linear over runs of rows, each with a weight of its own: `VariantStack` on a GPU.

    y_r = W_v(r) x_r + b_v(r)        v(r) = run_row[g] for rows run_start_loc[g] ≤ r < run_start_loc[g + 1]

    x:  |---- run 0 ----|-- run 1 --|(run 2 is empty)|------ run 3 ------|      runs are variants, rows sorted by them
        |-tile-|-tile-|t|-tile-|tile|                |-tile-|-tile-|-tile|      a tile never spans runs

Letters: T rows, G runs, R stored weights, I inputs, O outputs. The runs are device tensors, and the grid has as many
tiles as any T rows in G runs can need, so a captured call is valid for every mix of variants and for every row map.
Sums are float32, rounded once. Bytes moved: O · I of each weight present (once a tile, from the L2 cache but for the
first), T · I a block of columns from the L2 cache, T · O.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels.gpu.autotune import Config, choose, row_bucket
from polymoe.kernels.gpu.packed_product import stored_product

_CONFIGS = {
    16: (Config(32, 256, 4, 4), Config(16, 512, 4, 4), Config(64, 128, 4, 4), Config(32, 512, 4, 3)),
    32: (Config(32, 256, 4, 4), Config(64, 128, 4, 4), Config(128, 64, 4, 4)),
    64: (Config(64, 64, 4, 4), Config(128, 64, 4, 4), Config(64, 128, 4, 3)),
    128: (Config(128, 64, 8, 3), Config(256, 64, 8, 3), Config(128, 64, 4, 4)),
}
_TILES_TOGETHER = 8


def segmented_linear(x: Tensor, stack: Tensor, bias: Tensor | None, run_row: Tensor, run_start_loc: Tensor) -> Tensor:
    """Each run of rows times its own weight, without waiting for the device.

    Args:
        x: `[T, I]`, the last axis contiguous. stack: `[R, O, I]`, contiguous. bias: `[R, O]` or None.
        run_row: `[G]` int32 on the device; −1 for a variant that is not loaded, whose run must be empty.
        run_start_loc: `[G + 1]` int32 on the device, ascending from 0.

    Returns: `[T, O]` in x's dtype; rows from `run_start_loc[G]` on are not written.
    """
    num_rows, num_runs = x.shape[0], len(run_row)
    _check(x, stack, bias, run_row, run_start_loc)
    out = x.new_empty(num_rows, stack.shape[1])
    if num_rows == 0:
        return out
    mean = num_rows / min(num_rows, num_runs)
    block_m = next((size for size in (16, 32, 64) if mean <= size), 128)
    tiles = min(num_rows, num_rows // block_m + min(num_rows, num_runs))

    def launch(config: Config) -> None:
        _kernel[(tiles * triton.cdiv(stack.shape[1], config.block_n),)](
            x, stack, x if bias is None else bias, run_row, run_start_loc, out, num_runs, tiles, x.stride(0),
            INPUTS=stack.shape[2], OUTPUTS=stack.shape[1], BIAS=bias is not None,
            RUNS=triton.next_power_of_2(num_runs), TOGETHER=_TILES_TOGETHER, BLOCK_M=block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    shape = (x.dtype, *stack.shape[1:], min(num_rows, num_runs), block_m, row_bucket(num_rows))
    launch(choose("segmented_linear", shape, _CONFIGS[block_m], launch))
    return out


def segmented_linear_torch(
    x: Tensor, stack: Tensor, bias: Tensor | None, run_row: Tensor, run_start_loc: Tensor
) -> Tensor:
    """The reference: one product a run. Arguments as `segmented_linear`."""
    _check(x, stack, bias, run_row, run_start_loc)
    out = x.new_empty(x.shape[0], stack.shape[1])
    bounds = run_start_loc.tolist()
    for row, start, stop in zip(run_row.tolist(), bounds[:-1], bounds[1:], strict=True):
        if start < stop:
            own = None if bias is None else bias[row]
            out[start:stop] = torch.nn.functional.linear(x[start:stop], stack[row], own)
    return out


def _check(x: Tensor, stack: Tensor, bias: Tensor | None, run_row: Tensor, run_start_loc: Tensor) -> None:
    assert x.ndim == 2
    assert x.shape[1] == stack.shape[2]
    assert x.stride(1) == 1
    assert stack.is_contiguous()
    assert bias is None or (bias.shape == stack.shape[:2] and bias.is_contiguous())
    assert len(run_start_loc) == len(run_row) + 1
    assert run_row.dtype == run_start_loc.dtype == torch.int32


@triton.jit(do_not_specialize=["num_runs", "num_tiles"])
def _kernel(
    x_ptr, stack_ptr, bias_ptr, run_row_ptr, run_start_ptr, out_ptr, num_runs, num_tiles, stride_x,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a run, one block of outputs; which run it is follows from the tiles of the runs before it."""
    blocks: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first_tile = pid // (TOGETHER * blocks) * TOGETHER
    together = tl.minimum(num_tiles - first_tile, TOGETHER)
    within = pid % (TOGETHER * blocks)
    tile = first_tile + within % together
    block = within // together

    run = tl.arange(0, RUNS)
    starts = tl.load(run_start_ptr + run, mask=run < num_runs, other=0)
    stops = tl.load(run_start_ptr + run + 1, mask=run < num_runs, other=0)
    tiles_of_run = (stops - starts + BLOCK_M - 1) // BLOCK_M
    tiles_up_to = tl.cumsum(tiles_of_run, 0)
    if tile >= tl.sum(tiles_of_run, 0):
        return
    mine = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)  # the run that holds this tile
    is_mine = run == mine
    start = tl.sum(tl.where(is_mine, starts + (tile - (tiles_up_to - tiles_of_run)) * BLOCK_M, 0), 0)
    stop = tl.sum(tl.where(is_mine, stops, 0), 0)
    stored = tl.load(run_row_ptr + mine)
    if stored < 0:
        return

    row = start + tl.arange(0, BLOCK_M)
    row_ok = row < stop
    row = tl.minimum(row, stop - 1).to(tl.int64)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = stored.to(tl.int64) * OUTPUTS + column % OUTPUTS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = stored_product(acc, x_ptr + row * stride_x, row_ok, stack_ptr + weight_row * INPUTS, INPUTS, BLOCK_M, BLOCK_K)
    if BIAS:
        acc += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * OUTPUTS + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (column < OUTPUTS)[None, :])
