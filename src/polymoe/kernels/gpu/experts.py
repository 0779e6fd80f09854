"""The routed experts of one layer on a GPU, for a batch that mixes variants: sort, gate and up, down, combine.

    y_t = Σ_k g_tk · (silu(x_t G) ∘ (x_t U)) D ,   G, U, D = base_b + s · delta_d of (variant of t, k-th expert of t)

Letters as in `grouped_experts.py`. `experts_torch` is the reference. Rows of one step go through memory as x `[T, H]`,
silu · up `[S, I]` in x's dtype and weighted outputs `[S, H]` in float32; weights as `expert_gemm.py` says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import is_plain_silu
from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool, StoredPool
from polymoe.kernels.gpu.combine import combine_rows, combine_rows_torch
from polymoe.kernels.gpu.expert_gemm import GATED, LINEAR, WEIGHTED, block_m_for, expert_gemm, expert_gemm_torch
from polymoe.kernels.gpu.pool_matrix import PoolMatrix, exact_matrix, packed_matrix, stored_matrix
from polymoe.kernels.gpu.token_sort import SortedRows, sort_rows, sort_rows_torch

Weights = Mapping[str, Tensor]


def supported(module: Any, weights: Weights | CompressedLayer) -> bool:
    """Whether `experts_gpu` computes this layer; else use `experts_by_grouped_mm` or `experts_compressed`.

    Not for experts without a plain SiLU gate, stored as [in, out] (`is_transposed`), or with lossless deltas of biases;
    nor for a layer of which nothing is on the device.
    """
    if not is_plain_silu(module):
        return False
    if not isinstance(weights, CompressedLayer):
        return _num_stored(weights) > 0 and not module.is_transposed
    as_stored = [weights.stored, *(pool.tensors for pool in weights.bases if isinstance(pool, StoredPool))]
    if module.is_transposed and any(map(_num_stored, as_stored)):
        return False
    resident = _num_stored(weights.stored) + sum(len(pool) for pool in weights.bases)
    exact = [pool for pool in weights.deltas if isinstance(pool, ExactPool)]
    return (
        resident > 0 and len(exact) <= 1 and not any(name.endswith("_bias") for pool in exact for name in pool.tensors)
    )


Pools = tuple[list[PoolMatrix], list[PoolMatrix]]  # of bases, of deltas


@dataclass(frozen=True, eq=False)
class ExpertMatrices:
    """What the kernels are told of one layer; to make it costs more than a launch."""

    gate_up: Pools
    down: Pools
    dtype: torch.dtype


def expert_matrices(weights: Weights | CompressedLayer, dtype: torch.dtype, transposed: bool = False) -> ExpertMatrices:
    """Of a layer that `supported` accepts.

    Args:
        weights: the stock stacks by name `[P, …]`, or the layer's packed pools.
        dtype: what is computed in. transposed: whether the stock module holds experts as `[in, out]`.
    """
    gate_up, down = (_pools(weights, name, dtype, transposed) for name in ("gate_up_proj", "down_proj"))
    return ExpertMatrices(gate_up, down, dtype)


def experts_gpu(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    token_variant: Tensor,
    table: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    matrices: ExpertMatrices,
    num_absent: int | None = None,
) -> Tensor:
    """One layer's experts. Never waits for the device; shapes decide everything that is not on it.

    Args:
        hidden: `[T, H]`. top_k_index, top_k_weights: `[T, K]`, indices valid for padding too.
        token_variant: `[T]`; < 0 is padding: zeros come out, and no weights are read for it.
        table: `[V, E]` int32, the layer's; may be a strided view. An id < 0 (absent) contributes zero: add its share.
        delta, sign: `[V, E]` int32 and int8 with the strides of `table`, or None.
        matrices: the layer's, made once (`expert_matrices`) in `hidden`'s dtype.
        num_absent: how many different absent experts the table names at most, 0 if all are on the device; None: it is
            not known, and the grids are as large as if every entry had an expert of its own.

    Returns: `[T, H]` in `hidden`'s dtype.
    """
    return _experts(
        hidden, top_k_index, top_k_weights, token_variant, table, delta, sign, matrices, num_absent,
        (sort_rows, expert_gemm, combine_rows),
    )  # fmt: skip


def experts_torch(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    token_variant: Tensor,
    table: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    matrices: ExpertMatrices,
    num_absent: int | None = None,
) -> Tensor:
    """The reference: the same steps, each in torch. Arguments as `experts_gpu`."""
    return _experts(
        hidden, top_k_index, top_k_weights, token_variant, table, delta, sign, matrices, num_absent,
        (sort_rows_torch, expert_gemm_torch, combine_rows_torch),
    )  # fmt: skip


def warm_up(
    module: Any,
    weights: Weights | CompressedLayer,
    table: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    num_tokens: Iterable[int],
    dtype: torch.dtype,
    top_k: int,
) -> None:
    """Compile, and choose configurations, for batches of `num_tokens` each, routed at random over all variants.

    Call it before CUDA graphs are captured. Arguments as `expert_matrices` and `experts_gpu`.
    """
    num_variants, num_experts = table.shape
    matrices = expert_matrices(weights, dtype, module.is_transposed)
    width = matrices.gate_up[0][0].inputs
    for count in num_tokens:
        hidden = torch.randn(count, width, dtype=dtype, device=table.device)
        index = torch.rand(count, num_experts, device=table.device).topk(top_k).indices
        weight = torch.full((count, top_k), 1 / top_k, device=table.device)
        variant = torch.arange(count, device=table.device) * num_variants // count
        experts_gpu(hidden, index, weight, variant, table, delta, sign, matrices)


Steps = tuple[Any, Any, Any]  # sort, multiply, combine


def _experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, token_variant: Tensor, table: Tensor,
    delta: Tensor | None, sign: Tensor | None, matrices: ExpertMatrices, num_absent: int | None, steps: Steps,
) -> Tensor:  # fmt: skip
    sort, multiply, combine = steps
    top_k, num_rows = top_k_index.shape[1], top_k_index.numel()
    if num_rows == 0:
        return torch.zeros_like(hidden)
    gate_up, down = matrices.gate_up, matrices.down
    assert hidden.dtype == matrices.dtype
    if not gate_up[1]:
        delta = sign = None
    resident = min(sum(matrix.count for matrix in gate_up[0]), table.numel())
    num_bases = table.numel() if num_absent is None else min(resident + num_absent, table.numel())
    rows = sort(
        top_k_index, token_variant, table, delta, sign, block_m_for(num_rows, resident), num_bases
    )  # fmt: skip
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    inner = _gate_up(hidden, rows, *gate_up, multiply)
    out = hidden.new_empty(num_rows, down[0][0].outputs, dtype=torch.float32)
    passes(multiply, WEIGHTED.value, inner, rows, *down, out, top_k_weights.contiguous(), zero_absent=True)
    summed: Tensor = combine(out, top_k, hidden.dtype)
    return summed


def _gate_up(
    hidden: Tensor, rows: SortedRows, bases: list[PoolMatrix], deltas: list[PoolMatrix], multiply: Any
) -> Tensor:
    """silu(gate) ∘ up, sorted: `[S, I]` in `hidden`'s dtype."""
    num_rows, outputs = len(rows.order), bases[0].outputs
    if len(deltas) <= 1:
        inner = hidden.new_empty(num_rows, outputs // 2)
        passes(multiply, GATED.value, hidden, rows, bases, deltas, inner)
        return inner
    # The sum must be complete before the activation.
    both = hidden.new_empty(num_rows, outputs, dtype=torch.float32)
    passes(multiply, LINEAR.value, hidden, rows, bases, deltas, both)
    gate, up = both.chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(hidden.dtype)


def passes(
    multiply: Any, kind: int, x: Tensor, rows: SortedRows, bases: list[PoolMatrix], deltas: list[PoolMatrix],
    out: Tensor, routing_weight: Tensor | None = None, zero_absent: bool = False,
) -> None:  # fmt: skip
    """Each pool of bases with the first of deltas in one kernel; further delta formats add to what is there. multiply:
    `expert_gemm` or its reference, of `kind`."""
    first = deltas[0] if deltas else None
    for number, base in enumerate(bases):
        # Lossless deltas are of stored bases alone.
        own = None if first is not None and first.format.is_lossless and base.format.is_packed else first
        multiply(kind, x, rows, base, own, out, routing_weight, zero_absent=zero_absent and number == 0)
    for delta in deltas[1:]:
        multiply(kind, x, rows, None, delta, out, routing_weight, add=True)


def _pools(weights: Weights | CompressedLayer, name: str, dtype: torch.dtype, transposed: bool) -> Pools:
    if not isinstance(weights, CompressedLayer):
        return [stored_matrix(weights[name], weights.get(f"{name}_bias"))], []
    bases, deltas = [], []
    first = _num_stored(weights.stored)
    if first:
        assert not transposed
        bases.append(stored_matrix(weights.stored[name], weights.stored.get(f"{name}_bias")))
    for pool in weights.bases:
        if isinstance(pool, StoredPool):
            bases.append(stored_matrix(pool.tensors[name], pool.tensors.get(f"{name}_bias"), first))
        else:
            bases.append(packed_matrix(pool, name, first, dtype))
        first += len(pool)
    first = 0
    for delta in weights.deltas:
        if isinstance(delta, PackedPool):
            deltas.append(packed_matrix(delta, name, first, dtype))
        else:
            deltas.append(exact_matrix(delta, name, bases[0].inputs, first, dtype))
        first += len(delta)
    return bases, sorted(deltas, key=lambda matrix: not matrix.format.is_lossless)  # theirs is the pass with the base


def pools_of(layer: CompressedLayer, dtype: torch.dtype) -> Pools:
    """Of a layer with one matrix, called "weight", for activations of `dtype`."""
    return _pools(layer, "weight", dtype, transposed=False)


def _num_stored(stored: Weights) -> int:
    return next(iter(stored.values())).shape[0] if stored else 0
