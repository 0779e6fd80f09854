"""The compiled kernels of `polymoe.kernels.cpu`, and torch for what these do not know."""

from functools import partial
from typing import Any

import torch

from polymoe.kernels.cpu.compressed_experts import experts_compressed
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import experts_by_group, experts_in_one_call, why_not_one_call
from polymoe.kernels.cpu.grouped_linear import grouped_linear, why_not_grouped
from polymoe.kernels.cpu.packed_experts import why_not_fused, why_not_packed
from polymoe.kernels.cpu.packed_rows import PackedRows, packed_rows_linear
from polymoe.kernels.cpu.paged_attention import paged_attention, why_not_attention
from polymoe.kernels.cpu.rms_norm import fast_rms_norm, why_not_fast_norm
from polymoe.kernels.cpu.routed_layer import RoutedLayer, routed_layer
from polymoe.kernels.cpu.router import Choice, Scoring, fast_router, why_not_fast_router
from polymoe.kernels.cpu.tiles import ACTIVATIONS, Activations, tiled_layer, tiled_rows
from polymoe.model.backends.base import (
    AttentionParts,
    Cache,
    DecoderParts,
    ExpertLayer,
    PassParts,
    PreparedAttention,
    PreparedDecoderLayer,
    PreparedExperts,
    PreparedPass,
    ScoreOptions,
    TokenSpans,
)
from polymoe.model.backends.cpu_attention import StepViews, compiled_attention
from polymoe.model.backends.cpu_decoder import compiled_decoder_layer, compiled_pass
from polymoe.model.backends.reference import ReferenceBackend, experts_path, stored_inputs
from polymoe.model.backends.routed_experts import PackedExperts, StoredExperts
from polymoe.model.batch.batch import AttentionBatch, RowMap, Segments
from polymoe.native.library import instruction_set


class CpuBackend(ReferenceBackend):
    """See the module docstring. Only where `cpu_kernels()` is there.

    Args:
        dtype: of the model. All kernels know bfloat16; in others packed experts are compiled and the rest is torch's.
        activations: bits that rows are rounded to where they meet packed experts in tiles.
    """

    runs_on = "compiled"

    def __init__(self, dtype: torch.dtype, activations: Activations = ACTIVATIONS["int16"]) -> None:
        self.has_own_threads = dtype == torch.bfloat16
        self.activations = activations
        # Deltas are small, and what they add is as coarse as the coarser of both products of an expert.
        self._bits = max(activations), min(activations)
        self._steps = StepViews()
        self._one_group = torch.zeros(1, dtype=torch.int64)

    @property
    def multiplies_on(self) -> str:
        """See the base class."""
        return f"{self.runs_on} ({instruction_set()})" if instruction_set() else self.runs_on

    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """All runs in one call."""
        groups = segments.row_groups(row_map)
        return grouped_linear(x, stack, groups.ids, groups.starts)

    def packed_linear(self, x: torch.Tensor, rows: PackedRows, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """All runs in one call; a base is decoded once for all of them."""
        given = segments.row_groups(row_map).packed(rows.versions)
        return packed_rows_linear(x, rows, given, self._bits)

    def rms_norm(
        self, x: torch.Tensor, weights: torch.Tensor, stacked: tuple[Segments, RowMap] | None, eps: float
    ) -> torch.Tensor:
        """One call; torch's for rows that do not lie one after the other."""
        if not x.is_contiguous() or why_not_fast_norm(x.dtype, x.shape[-1]):
            return super().rms_norm(x, weights, stacked, eps)
        if stacked is None:
            return fast_rms_norm(x, weights, None, 1, eps)
        segments, row_map = stacked
        groups = segments.row_groups(row_map)
        if len(groups.ids) == 1:
            return fast_rms_norm(x, weights[int(groups.ids[0])][None], None, 1, eps)
        repeat = x.numel() // (segments.num_tokens * x.shape[-1])
        return fast_rms_norm(x, weights, segments.row_of_token(row_map), repeat, eps)

    def attention(self, query: torch.Tensor, cache: Cache, batch: AttentionBatch, scores: ScoreOptions) -> torch.Tensor:
        """Each token by itself, without gathering; torch's with sinks or a softcap."""
        if scores.sinks is not None or scores.softcap is not None or not _attends(query, cache):
            return super().attention(query, cache, batch, scores)
        tokens = batch.token_sequence, batch.token_visible
        return paged_attention(query.contiguous(), *cache, batch.block_table, *tokens, scores.scaling, scores.window)

    def span_attention(self, query: torch.Tensor, cache: Cache, spans: TokenSpans) -> torch.Tensor:
        """Each token by itself, without gathering."""
        if not _attends(query, cache):
            return super().span_attention(query, cache, spans)
        tokens = spans.block_table, spans.sequence, spans.visible
        return paged_attention(query.contiguous(), *cache, *tokens, 1.0, None, spans.start, spans.bias)

    def prepare_attention(self, parts: AttentionParts) -> PreparedAttention | None:
        """In bfloat16."""
        if not self.has_own_threads:
            return None
        return compiled_attention(parts, self._steps, self._bits)

    def prepare_decoder_layer(self, parts: DecoderParts) -> PreparedDecoderLayer | None:
        """Where attention and the experts are one call each."""
        return compiled_decoder_layer(parts, self._steps) if self.has_own_threads else None

    def prepare_pass(self, parts: PassParts) -> PreparedPass | None:
        """In one call."""
        return compiled_pass(parts, self._steps, self._bits) if self.has_own_threads else None

    def route(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        stacked: tuple[Segments, RowMap] | None,
        top_k: int,
        scoring: Scoring,
    ) -> Choice:
        """One call."""
        if stacked is None:
            return fast_router(x, weights, self._one_group, torch.tensor([0, len(x)]), top_k, scoring)
        groups = stacked[0].row_groups(stacked[1])
        return fast_router(x, weights, groups.ids, groups.starts, top_k, scoring)

    def why_not_route(self, dtype: torch.dtype, width: int) -> str:
        """See the base class."""
        return why_not_fast_router(dtype, width)

    def laid_out(self, module: Any, weights: CompressedLayer, dtype: torch.dtype) -> CompressedLayer:
        """In tiles where one call computes the layer."""
        return tiled_layer(module, weights, dtype)

    def laid_out_rows(self, rows: PackedRows, whole: bool) -> PackedRows:
        """In tiles, where the model is bfloat16."""
        return tiled_rows(rows, whole) if self.has_own_threads else rows

    def prepare_experts(self, module: Any, layer: ExpertLayer) -> PreparedExperts:
        """A layer in one call where there is a kernel for it, else each product in a call of its own."""
        weights = layer.weights
        if isinstance(weights, CompressedLayer):
            if reason := why_not_packed(weights):
                path = experts_path("torch packed", reason, slow=True)
            else:
                reason = why_not_fused(module, layer.dtype, weights)
                path = experts_path("compiled packed", reason and f"each product by itself: {reason}")
            if weights.is_tiled:
                unit = f", {instruction_set()}" if instruction_set() else ""
                path = experts_path(f"compiled packed ({self.activations}{unit})")
            product = partial(experts_compressed, activation_bits=self.activations)
            return PackedExperts(path, module, layer, weights, product, self._in_one_call(module, layer))
        prepared = super().prepare_experts(module, layer)
        path = experts_path(self.multiplies_on.replace("compiled", "compiled stored"))
        if why_not_grouped(layer.dtype, stored_inputs(layer)):
            path = prepared.path
        resident = experts_by_group if why_not_one_call(module, layer.dtype, weights) else experts_in_one_call
        beside = None
        if layer.num_absent and weights and layer.dtype == torch.bfloat16:
            stored = CompressedLayer(weights, (), (), layer.transposed)
            beside = PackedExperts(path, module, layer, stored, experts_compressed)
        direct = None if layer.transposed else self._in_one_call(module, layer)
        return StoredExperts(path, module, layer, None if layer.transposed else resident, beside, direct)

    def _in_one_call(self, module: Any, layer: ExpertLayer) -> RoutedLayer | None:
        """The layer with its tables, where none of its experts is absent."""
        if layer.num_absent:
            return None
        tables = layer.table, layer.delta, layer.sign
        return routed_layer(module, layer.dtype, *tables, layer.weights, self.activations)

    def _reason(self, of_cpu: str) -> str:
        return of_cpu


def _attends(query: torch.Tensor, cache: Cache) -> bool:
    return not why_not_attention(query.dtype, cache[0].shape[3], cache[1].shape[3])
