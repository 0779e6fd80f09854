"""Everything in torch: what the other backends are compared with, and what they leave to it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from polymoe.kernels.cpu.compressed_experts import experts_compressed_torch
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import experts_by_group, experts_by_grouped_mm
from polymoe.kernels.cpu.grouped_linear import grouped_linear_by_loop, why_not_grouped
from polymoe.kernels.cpu.packed_rows import PackedRows, packed_rows_linear_torch
from polymoe.kernels.cpu.paged_attention import why_not_attention
from polymoe.kernels.cpu.rms_norm import rms_norm, why_not_fast_norm
from polymoe.model.backends import reference_attention
from polymoe.model.backends.base import Backend, Cache, ExpertLayer, PreparedExperts, ScoreOptions, TokenSpans
from polymoe.model.backends.routed_experts import PackedExperts, StoredExperts
from polymoe.model.batch.batch import AttentionBatch, RowMap, Segments
from polymoe.native.library import why_no_kernels
from polymoe.protocol.fast_path import FastPath

_ASKED_FOR = "the reference backend"


class ReferenceBackend(Backend):
    """See the module docstring."""

    runs_on = "torch"

    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """One matmul for each run of rows."""
        groups = segments.row_groups(row_map)
        return grouped_linear_by_loop(x, stack, groups.ids, groups.starts)

    def packed_linear(self, x: torch.Tensor, rows: PackedRows, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """One version after the other."""
        return packed_rows_linear_torch(x, rows, segments.row_groups(row_map).packed(rows.versions))

    def rows_of_tokens(self, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """One version for all is a view, no gather."""
        groups = segments.row_groups(row_map)
        if len(groups.ids) == 1:
            return stack[int(groups.ids[0])].expand(segments.num_tokens, *stack.shape[1:])
        return stack[segments.row_of_token(row_map)]

    def rms_norm(
        self, x: torch.Tensor, weights: torch.Tensor, stacked: tuple[Segments, RowMap] | None, eps: float
    ) -> torch.Tensor:
        """The formula."""
        if stacked is None:
            return rms_norm(x, weights[0], eps)
        own = self.rows_of_tokens(weights, *stacked)
        return rms_norm(x.reshape(len(own), -1, x.shape[-1]), own[:, None], eps).view(x.shape)

    def attention(self, query: torch.Tensor, cache: Cache, batch: AttentionBatch, scores: ScoreOptions) -> torch.Tensor:
        """Sequences with one token together, all others one by one."""
        return reference_attention.batch_attention(query, cache, batch, scores)

    def span_attention(self, query: torch.Tensor, cache: Cache, spans: TokenSpans) -> torch.Tensor:
        """All tokens in one padded batch."""
        return reference_attention.span_attention(query, cache, spans)

    def prepare_experts(self, module: Any, layer: ExpertLayer) -> PreparedExperts:
        """Expert by expert, or one grouped product of torch's."""
        weights = layer.weights
        if isinstance(weights, CompressedLayer):
            path = experts_path("torch packed", why_no_kernels() or _ASKED_FOR, slow=True)
            return PackedExperts(path, module, layer, weights, experts_compressed_torch)
        reason = why_not_grouped(layer.dtype, stored_inputs(layer)) or _ASKED_FOR
        # 3 to 6 times in bfloat16; others have no kernel.
        path = experts_path("torch stored", reason, slow=layer.dtype == torch.bfloat16)
        if layer.table.is_cuda:
            grouped = experts_by_grouped_mm if layer.dtype == torch.bfloat16 and not layer.num_absent else None
            return StoredExperts(path, module, layer, grouped)
        by_group = partial(experts_by_group, linear=grouped_linear_by_loop)
        return StoredExperts(path, module, layer, None if layer.transposed else by_group)

    def why_not_linear(self, dtype: torch.dtype, inputs: int) -> str:
        """See the base class."""
        return self._reason(why_not_grouped(dtype, [inputs]))

    def why_not_packed_linear(self, dtype: torch.dtype, rows: PackedRows) -> str:
        """See the base class."""
        del dtype
        return self._reason("" if rows.matrix is not None else "packed in a layout that the kernels do not know")

    def why_not_norm(self, dtype: torch.dtype, width: int) -> str:
        """See the base class."""
        return self._reason(why_not_fast_norm(dtype, width))

    def why_not_attention(self, dtype: torch.dtype, key_dim: int, value_dim: int, extras: Sequence[str]) -> str:
        """See the base class."""
        return self._reason(why_not_attention(dtype, key_dim, value_dim) or " and ".join(extras))

    def _reason(self, of_cpu: str) -> str:
        """Why torch computes something. of_cpu: why the CPU's kernels do not, if they do not."""
        return of_cpu or _ASKED_FOR


def experts_path(runs_on: str, reason: str = "", slow: bool = False) -> FastPath:
    """Of one layer's resident experts."""
    return FastPath(part="experts", runs_on=runs_on, count=1, reason=reason, slow=slow)


def stored_inputs(layer: ExpertLayer) -> list[int]:
    """How many inputs each stored matrix has."""
    assert not isinstance(layer.weights, CompressedLayer)
    return [stack.shape[-1] for stack in layer.weights.values() if stack.ndim == 3]
