"""What computes on a GPU: the Triton kernels, fed from device tensors alone.

`ServedModel` chooses once: a model on a CPU has none of these, one on a GPU has one, and tests give one to a model on a
CPU, where Triton's interpreter runs the same kernels. Nothing here waits for the device, so that a decode step can be
captured in a CUDA graph.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from polymoe.kernels.cpu.compressed_layer import CompressedLayer, Weights
from polymoe.model.backends.base import DeviceKernels, Tables
from polymoe.model.batch.batch import AttentionBatch, RowMap, Segments

# From so many rows on a product for each variant's run by the vendor's library beats one kernel over all runs.
_LIBRARY_ROWS = 512


class CudaKernels(DeviceKernels):
    """The kernels of `polymoe.kernels.gpu` behind the shapes that the model has. See the module docstring.

    Args:
        reference: their slow references in torch, which have the same signatures.
    """

    def __init__(self, reference: bool = False) -> None:
        # Here, since they import Triton, which not every torch brings.
        from polymoe.kernels.gpu import experts, paged_attention, segmented_linear, varlen_attention
        from polymoe.kernels.gpu import rms_norm as rms_norm_triton

        self._supported = experts.supported
        self._attention: Callable[..., torch.Tensor]
        if reference:
            self._linear = segmented_linear.segmented_linear_torch
            self._attention = paged_attention.paged_attention_torch
            self._experts = experts.experts_torch
            self._rms_norm = rms_norm_triton.rms_norm_torch
        else:
            self._linear = segmented_linear.segmented_linear
            self._attention = varlen_attention.ChosenAttention()
            self._experts = experts.experts_gpu
            self._rms_norm = rms_norm_triton.rms_norm_gpu

    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """`x [T, I]` times each token's own row of `stack [R, O, I]` -> `[T, O]`."""
        if segments.spans and x.is_cuda and x.shape[0] >= _LIBRARY_ROWS:
            return _linear_by_runs(x, stack, segments, row_map)
        assert row_map.device_rows is not None
        return self._linear(x, stack, None, row_map.device_rows, segments.start_loc(len(row_map.rows)))

    def rms_norm(
        self, x: torch.Tensor, weights: torch.Tensor, version: torch.Tensor | None, repeat: int, eps: float
    ) -> torch.Tensor:
        """See `polymoe.kernels.gpu.rms_norm`."""
        return self._rms_norm(x, weights, version, repeat, eps)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: AttentionBatch,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`query [T, Hq, D]` over the cache of one layer `[blocks, block_size, Hk, D / Dv]` -> `[T, Hq, Dv]`."""
        lengths = batch.device_lengths
        assert lengths is not None
        return self._attention(
            query, key, value, batch.block_table, lengths.query_start_loc, lengths.seq_lens,
            max_query_len=lengths.max_query_len, scaling=scaling, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip

    def supports_experts(self, module: torch.nn.Module, weights: Weights | CompressedLayer) -> bool:
        """Whether `experts` computes this layer; otherwise torch does."""
        return self._supported(module, weights)

    def experts(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        token_variant: torch.Tensor,
        tables: Tables,
        weights: Weights | CompressedLayer,
        num_absent: int,
    ) -> torch.Tensor:
        """A layer's resident experts for `hidden [T, H]`; what is routed to an absent one adds nothing.

        Args:
            tables: the layer's physical ids, deltas and signs, `[V, E]` each.
            num_absent: how many different absent experts the ids name at most.
        """
        return self._experts(module, hidden, top_k_index, top_k_weights, token_variant, *tables, weights, num_absent)


def _linear_by_runs(x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
    if len(segments.spans) == 1:
        return F.linear(x, stack[row_map.rows[segments.spans[0][0]]])
    out = x.new_empty(x.shape[0], stack.shape[1])
    for variant, start, end in segments.spans:
        torch.mm(x[start:end], stack[row_map.rows[variant]].t(), out=out[start:end])
    return out
