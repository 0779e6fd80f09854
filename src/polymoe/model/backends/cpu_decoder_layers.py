"""Whole decoder layers in one call on a CPU: what the kernel is told of their weights."""

import ctypes
from collections.abc import Sequence

import torch

from polymoe.kernels.cpu.decoder_layers import DecoderView, DecoderViews, Router, decoder_layers
from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.kernels.cpu.routed_layer import RoutedLayer
from polymoe.kernels.cpu.router import why_not_fast_router
from polymoe.model.backends.base import CachedLayer, DecoderParts
from polymoe.model.backends.cpu_attention import CompiledAttention, StepViews, norm_view
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
        self._attention, self._told = attention, told
        self.steps = steps
        self._layer: CachedLayer | None = None

    def view(self, layer: CachedLayer) -> DecoderView:
        """What the kernel is told of it; the same object always."""
        if self._layer is not layer:
            self._told.attention, self._layer = ctypes.addressof(self._attention.view(layer)), layer
        return self._told


class CompiledDecoder:
    """Several of them, one after the other."""

    def __init__(self, layers: Sequence[CompiledDecoderLayer]) -> None:
        self._layers, self._steps = layers, layers[0].steps
        self._views: tuple[Sequence[CachedLayer], DecoderViews] | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch,
        caches: Sequence[CachedLayer],
    ) -> torch.Tensor:
        """See the base class."""
        if self._views is None or self._views[0] is not caches:
            views = [layer.view(cache) for layer, cache in zip(self._layers, caches, strict=True)]
            self._views = caches, DecoderViews(views)
        return decoder_layers(self._views[1], self._steps.of(batch), hidden.contiguous(), *rotary)


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
