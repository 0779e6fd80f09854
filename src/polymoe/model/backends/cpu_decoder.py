"""Whole decoder layers, and whole passes, in one call on a CPU: what the kernel is told of their weights."""

import ctypes

import torch

from polymoe.kernels.cpu.attention_layer import Projection
from polymoe.kernels.cpu.decoder import DecoderView, Embedding, PassView, Router, Turns, decoder_layer, whole_pass
from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.kernels.cpu.routed_layer import RoutedLayer
from polymoe.kernels.cpu.router import why_not_fast_router
from polymoe.model.backends.base import CachedLayer, DecoderParts, PassParts
from polymoe.model.backends.cpu_attention import CompiledAttention, StepViews, norm_view, projection_view
from polymoe.model.backends.routed_experts import PackedExperts, StoredExperts
from polymoe.model.batch.batch import ForwardBatch


class CompiledDecoderLayer:
    """See the module docstring. Made by `compiled_decoder_layer`."""

    def __init__(
        self,
        parts: DecoderParts,
        attention: CompiledAttention,
        experts: RoutedLayer,
        told: DecoderView,
        steps: StepViews,
    ) -> None:
        self._kept = parts, experts  # `told` has addresses of what they hold
        self._attention, self._told, self._steps = attention, told, steps
        self._layer: CachedLayer | None = None

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], batch: ForwardBatch, layer: CachedLayer
    ) -> torch.Tensor:
        """See the base class."""
        return decoder_layer(self.view(layer), self._steps.of(batch), hidden.contiguous(), *rotary)

    def view(self, layer: CachedLayer) -> DecoderView:
        """What the kernel is told of it; the same object always."""
        if self._layer is not layer:
            self._told.attention, self._layer = ctypes.addressof(self._attention.view(layer)), layer
        return self._told


class CompiledPass:
    """Made by `compiled_pass`."""

    def __init__(self, parts: PassParts, layers: list[CompiledDecoderLayer], told: PassView, steps: StepViews) -> None:
        self._parts, self._layers, self._told, self._steps = parts, layers, told, steps
        self._caches: tuple[CachedLayer, ...] = ()
        self.looks_up, self.has_head = bool(told.embedding.rows), bool(told.head.outputs)

    def __call__(
        self,
        tokens: torch.Tensor,
        turns: Turns,
        kept: torch.Tensor,
        batch: ForwardBatch,
        caches: tuple[CachedLayer, ...],
    ) -> torch.Tensor:
        """See the base class."""
        if self._caches is not caches:
            self._told.tell([layer.view(cache) for layer, cache in zip(self._layers, caches, strict=True)])
            self._caches = caches
        return whole_pass(self._told, self._steps.of(batch), tokens, turns, kept)


def compiled_decoder_layer(parts: DecoderParts, steps: StepViews) -> CompiledDecoderLayer | None:
    """None where one of the parts is not for the kernel."""
    attention, experts = parts.attention, parts.experts
    if not isinstance(attention, CompiledAttention) or not isinstance(experts, PackedExperts | StoredExperts):
        return None
    weight, top_k, scoring, scores = parts.router
    rows, width = weight.rows, attention.width
    if isinstance(rows, PackedRows) or not rows.is_contiguous() or why_not_fast_router(rows.dtype, width):
        return None
    direct, first, second = experts.direct, norm_view(parts.first, steps), norm_view(parts.second, steps)
    if direct is None or first is None or second is None or direct.width != width or rows.shape[2] != width:
        return None
    grouping = steps.index_of(weight.row_map)
    router = Router(rows.data_ptr(), grouping, rows.shape[1], top_k, scoring, scores == torch.bfloat16)
    told = DecoderView(
        first=first, second=second, experts=ctypes.addressof(direct.struct), router=router, width=width,
        multiplier=parts.multiplier,
    )  # fmt: skip
    return CompiledDecoderLayer(parts, attention, direct, told, steps)


def compiled_pass(parts: PassParts, steps: StepViews, bits: tuple[int, int]) -> CompiledPass | None:
    """None where one of the parts is not for the kernel. bits: as `compiled_attention`."""
    embedding, norm = Embedding(), norm_view(parts.norm, steps)
    head = projection_view(parts.head, None, steps, bits)
    layers = [layer for layer in parts.layers if isinstance(layer, CompiledDecoderLayer)]
    if norm is None or len(layers) < len(parts.layers):
        return None
    rows = parts.embedding.rows
    if not isinstance(rows, PackedRows) and rows.dtype == torch.bfloat16 and rows.is_contiguous():
        grouping = steps.index_of(parts.embedding.row_map)
        embedding = Embedding(rows.data_ptr(), grouping, rows.shape[1], parts.multiplier)
    return CompiledPass(parts, layers, PassView(embedding=embedding, norm=norm, head=head or Projection()), steps)
