"""What computes on a GPU: the Triton kernels, fed from device tensors alone, and torch for experts they do not know.

Tests give one to a model on a CPU, where Triton's interpreter runs the same kernels. Nothing here waits for the device,
so that a decode step can be captured in a CUDA graph; only experts that are absent, or have no kernel, do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.kernels.cpu.grouped_experts import experts_by_loop
from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.model.backends.base import AbsentExperts, Cache, ExpertLayer, PreparedExperts, Routed, ScoreOptions
from polymoe.model.backends.reference import ReferenceBackend, experts_path
from polymoe.model.backends.routed_experts import PackedExperts, StoredExperts
from polymoe.model.batch.batch import AttentionBatch, RowMap, Segments
from polymoe.protocol.fast_path import FastPath

# From so many rows on a product for each variant's run by the vendor's library beats one kernel over all runs.
_LIBRARY_ROWS = 512


class CudaBackend(ReferenceBackend):
    """The kernels of `polymoe.kernels.gpu` behind the shapes that the model has. See the module docstring.

    Args:
        reference: their slow references in torch, which have the same signatures.
    """

    runs_on = "GPU kernels"
    pads_steps = True
    keeps_tables_on_device = True
    holds_outputs_first = False
    takes_one_exact_pool = True

    def __init__(self, reference: bool = False) -> None:
        # Here, since they import Triton, which not every torch brings.
        from polymoe.kernels.gpu import experts, packed_linear, paged_attention, segmented_linear, varlen_attention
        from polymoe.kernels.gpu import rms_norm as rms_norm_triton

        self._supported, self._matrices = experts.supported, experts.expert_matrices
        self._attention: Callable[..., torch.Tensor]
        if reference:
            self._linear = segmented_linear.segmented_linear_torch
            self._packed_linear = packed_linear.packed_linear_torch
            self._attention = paged_attention.paged_attention_torch
            self._experts = experts.experts_torch
            self._rms_norm = rms_norm_triton.rms_norm_torch
        else:
            self._linear = segmented_linear.segmented_linear
            self._packed_linear = packed_linear.packed_linear_gpu
            self._attention = varlen_attention.ChosenAttention()
            self._experts = experts.experts_gpu
            self._rms_norm = rms_norm_triton.rms_norm_gpu

    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """All runs in one kernel, or a library's product for each of few long ones."""
        if segments.spans and x.is_cuda and x.shape[0] >= _LIBRARY_ROWS:
            return _linear_by_runs(x, stack, segments, row_map)
        assert row_map.device_rows is not None
        return self._linear(x, stack, None, row_map.device_rows, segments.start_loc(len(row_map.rows)))

    def packed_linear(self, x: torch.Tensor, rows: PackedRows, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """The experts' kernels, with one expert a token."""
        assert row_map.device_rows is not None
        return self._packed_linear(x, rows, segments.token_variant, row_map.device_rows)

    def rows_of_tokens(self, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """A gather: which rows these are only the device knows."""
        return stack[segments.row_of_token(row_map)]

    def rms_norm(
        self, x: torch.Tensor, weights: torch.Tensor, stacked: tuple[Segments, RowMap] | None, eps: float
    ) -> torch.Tensor:
        """One kernel; torch's for rows that do not lie one after the other."""
        if not x.is_contiguous():
            return super().rms_norm(x, weights, stacked, eps)
        if stacked is None:
            return self._rms_norm(x, weights, None, 1, eps)
        segments, row_map = stacked
        repeat = x.numel() // (segments.num_tokens * x.shape[-1])
        return self._rms_norm(x, weights, segments.row_of_token(row_map), repeat, eps)

    def attention(self, query: torch.Tensor, cache: Cache, batch: AttentionBatch, scores: ScoreOptions) -> torch.Tensor:
        """One kernel for sequences of any lengths."""
        lengths = batch.device_lengths
        assert lengths is not None
        return self._attention(
            query, *cache, batch.block_table, lengths.query_start_loc, lengths.seq_lens,
            max_query_len=lengths.max_query_len, scaling=scores.scaling, window=scores.window, softcap=scores.softcap,
            sinks=scores.sinks,
        )  # fmt: skip

    def prepare_experts(self, module: Any, layer: ExpertLayer) -> PreparedExperts:
        """The kernels, or torch for a module that they do not know."""
        if not self._supported(module, layer.weights):
            prepared = super().prepare_experts(module, layer)
            assert isinstance(prepared, PackedExperts | StoredExperts)
            return replace(prepared, path=experts_path("torch", "the GPU kernels do not know this module", slow=True))
        matrices = self._matrices(layer.weights, layer.dtype, module.is_transposed)
        return _CudaExperts(experts_path(self.runs_on), self, module, layer, matrices)

    def why_not_packed_linear(self, dtype: torch.dtype, rows: PackedRows) -> str:
        """See the base class."""
        del dtype, rows
        return ""

    def _reason(self, of_cpu: str) -> str:  # noqa: ARG002
        return ""  # we know of none


@dataclass(frozen=True)
class _CudaExperts:
    """One layer's experts by the kernels, which find them in the tables on the device."""

    path: FastPath
    backend: CudaBackend
    module: Any
    layer: ExpertLayer
    matrices: Any  # `ExpertMatrices` of kernels/gpu/experts.py
    follows_tables: bool = True

    def __call__(self, hidden: torch.Tensor, routed: Routed) -> torch.Tensor:
        """The host waits only where experts are absent, to learn which of them are needed."""
        layer, given = self.layer, (routed.experts, routed.gate, routed.token_variant)
        out = self.backend._experts(
            hidden, *given, layer.table, layer.delta, layer.sign, self.matrices, layer.num_absent
        )
        if not layer.num_absent:
            return out
        physical = layer.table[routed.token_variant[:, None], routed.experts]
        # The device is busy while absent experts are fetched.
        return (_absent_share(self.module, hidden, physical, routed.gate, layer.absent) + out).to(hidden.dtype)


def _absent_share(
    module: Any, hidden: torch.Tensor, physical: torch.Tensor, gate: torch.Tensor, absent: AbsentExperts
) -> torch.Tensor:
    """float32 `[T, H]`: what absent experts add."""
    token, k = (physical < 0).nonzero(as_tuple=True)
    on_host = absent.on_host(physical[token, k])
    absent.announce(physical.index_put((token[on_host], k[on_host]), physical.new_zeros(())))
    share = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    # First what the device computes, so that it is busy while the host computes the rest.
    for chosen, device, weights_of in (
        (~on_host, hidden.device, absent.weights_of),
        (on_host, torch.device("cpu"), absent.host_weights_of),
    ):
        rows, column = token[chosen], k[chosen]
        if len(rows):
            given = hidden[rows], physical[rows, column, None], gate[rows, column, None]
            x, ids, weight = (tensor.to(device) for tensor in given)
            own = experts_by_loop(module, x, ids, weight, weights_of)
            share.index_add_(0, rows, own.to(hidden.device).float())
    return share


def _linear_by_runs(x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
    if len(segments.spans) == 1:
        return F.linear(x, stack[row_map.rows[segments.spans[0][0]]])
    out = x.new_empty(x.shape[0], stack.shape[1])
    for variant, start, end in segments.spans:
        torch.mm(x[start:end], stack[row_map.rows[variant]].t(), out=out[start:end])
    return out
