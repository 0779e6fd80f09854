"""A packed non-expert matrix on a GPU: the experts' product (`expert_gemm.py`) with one expert a token.

    y_r = (B_b(r) + Δ_d(r)) x_r        as planned, one base for all variants and a delta for each, or a base for each

Letters: T rows, V variants, R packed versions, I inputs, O outputs. A base is read once for the rows of all variants.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.kernels.gpu.expert_gemm import LINEAR, block_m_for, expert_gemm, expert_gemm_torch
from polymoe.kernels.gpu.experts import Pools, passes, pools_of
from polymoe.kernels.gpu.token_sort import sort_rows, sort_rows_torch

Steps = tuple[Any, Any]  # sort, multiply

_made: "WeakKeyDictionary[PackedRows, dict[torch.dtype, Pools]]" = WeakKeyDictionary()


def packed_linear_gpu(x: Tensor, weight: PackedRows, token_variant: Tensor, variant_row: Tensor) -> Tensor:
    """Each row of `x` times its variant's version, without waiting for the device.

    Args:
        x: `[T, I]`. token_variant: `[T]`; rows below 0 are padding, whose outputs are anything.
        variant_row: `[V]` int32: the version of each variant; −1 for one that is not loaded and has no rows.

    Returns: `[T, O]` in x's dtype.
    """
    return _packed_linear(x, weight, token_variant, variant_row, (sort_rows, expert_gemm))


def packed_linear_torch(x: Tensor, weight: PackedRows, token_variant: Tensor, variant_row: Tensor) -> Tensor:
    """The reference. Arguments as `packed_linear_gpu`."""
    return _packed_linear(x, weight, token_variant, variant_row, (sort_rows_torch, expert_gemm_torch))


def _packed_linear(x: Tensor, weight: PackedRows, token_variant: Tensor, variant_row: Tensor, steps: Steps) -> Tensor:
    assert x.shape[1] == weight.shape[1]
    sort, multiply = steps
    num_rows = x.shape[0]
    if not num_rows:
        return x.new_empty(0, weight.shape[0])
    bases, deltas = _made.setdefault(weight, {}).setdefault(x.dtype, pools_of(weight.pools, x.dtype))
    base, delta = (ids[variant_row.clamp_min(0)][:, None] for ids in weight.versions.on(x.device))
    first = torch.zeros(num_rows, 1, dtype=torch.int64, device=x.device)
    num_bases = sum(map(len, weight.bases))
    rows = sort(
        first, token_variant, base, delta if deltas else None, None, block_m_for(num_rows, num_bases), num_bases
    )
    out = torch.empty(num_rows, weight.shape[0], dtype=torch.float32, device=x.device)
    passes(multiply, LINEAR.value, x, rows, bases, deltas, out)
    result = x.new_empty(out.shape)
    result[rows.order.long()] = out.to(x.dtype)
    return result
