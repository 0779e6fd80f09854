"""A whole attention layer in one call on a CPU: what the kernel is told of its weights and of a step."""

import ctypes

import torch

from polymoe.kernels.cpu.attention_layer import LayerView, Norm, Projection, StepView, Versions, attention_layer
from polymoe.kernels.cpu.grouped_linear import why_not_grouped
from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.kernels.cpu.packed_stack import address
from polymoe.kernels.cpu.paged_attention import why_not_attention
from polymoe.kernels.cpu.rms_norm import why_not_fast_norm
from polymoe.model.backends.base import AttentionParts, CachedLayer, Weight
from polymoe.model.batch.batch import ForwardBatch, RowMap, Segments


class StepViews:
    """What the kernel is told of the step that is under way, for all layers of a model."""

    def __init__(self) -> None:
        self._row_maps: list[RowMap | None] = []
        self._last: tuple[ForwardBatch, list[int], StepView] | None = None

    def index_of(self, row_map: RowMap | None) -> int:
        """By which number layers refer to it; None: all tokens use the one version there is."""
        for index, known in enumerate(self._row_maps):
            if known is row_map:
                return index
        self._row_maps.append(row_map)
        return len(self._row_maps) - 1

    def of(self, batch: ForwardBatch) -> StepView:
        """Made once for a batch, as long as its variants have the same rows."""
        known = [0 if row_map is None else row_map.generation for row_map in self._row_maps]
        if self._last is None or self._last[0] is not batch or self._last[1] != known:
            where = batch.attention
            assert where is not None
            versions = [_versions(batch.tokens, row_map) for row_map in self._row_maps]
            sampled = versions
            if batch.sampled is not batch.tokens:
                sampled = [_versions(batch.sampled, row_map) for row_map in self._row_maps]
            tokens = where.token_sequence, where.token_visible, batch.tokens.token_variant
            view = StepView(versions, sampled, where.slot_mapping, where.block_table, *tokens)
            self._last = batch, known, view
        return self._last[2]


def _versions(tokens: Segments, row_map: RowMap | None) -> Versions:
    if row_map is None:
        zeros = torch.zeros(tokens.num_tokens, dtype=torch.int64)
        return Versions(zeros[:1], torch.tensor([0, tokens.num_tokens]), zeros)
    groups = tokens.row_groups(row_map)
    return Versions(groups.ids, groups.starts, tokens.row_of_token(row_map))


class CompiledAttention:
    """See the module docstring. Made by `compiled_attention`."""

    def __init__(self, parts: AttentionParts, steps: StepViews, told: list[Projection | Norm]) -> None:
        self._parts, self._steps, self._told = parts, steps, told  # `told` has addresses of what `parts` hold
        self._view: tuple[CachedLayer, LayerView] | None = None
        self.width = int(told[0].inputs)

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], batch: ForwardBatch, layer: CachedLayer
    ) -> torch.Tensor:
        """See the base class."""
        return attention_layer(self.view(layer), self._steps.of(batch), hidden.contiguous(), *rotary)

    def view(self, layer: CachedLayer) -> LayerView:
        """What the kernel is told of it; the same object for the same layer."""
        if self._view is None or self._view[0] is not layer:
            self._view = layer, self._view_of(layer)
        return self._view[1]

    def _view_of(self, layer: CachedLayer) -> LayerView:
        key, value = layer.cache
        block_size, kv_heads, key_dim = key.shape[1:]
        assert key_dim == self._parts.head_dim
        q_heads = self._told[0].outputs // key_dim
        norms = [
            key_dim if norm is None else norm[0].rows.shape[-1]
            for norm in (self._parts.query_norm, self._parts.key_norm)
        ]
        return LayerView(
            *self._told, *norms, key.data_ptr(), value.data_ptr(), block_size, q_heads, kv_heads, key_dim,
            value.shape[3], layer.window or 0, self._parts.scaling,
        )  # fmt: skip


def compiled_attention(parts: AttentionParts, steps: StepViews, bits: tuple[int, int]) -> CompiledAttention | None:
    """None where one of the parts is not for the kernel.

    bits: that rows are rounded to where they meet packed weights, before the base and before deltas.
    """
    if why_not_attention(torch.bfloat16, parts.head_dim, parts.head_dim):
        return None
    projections = [projection_view(*part, steps, bits) for part in (parts.query, parts.key, parts.value, parts.output)]
    norms = [norm_view(norm, steps) for norm in (parts.query_norm, parts.key_norm)]
    told = [part for part in (*projections, *norms) if part is not None]
    return CompiledAttention(parts, steps, told) if len(told) == len(projections) + len(norms) else None


def projection_view(weight: Weight, bias: Weight | None, steps: StepViews, bits: tuple[int, int]) -> Projection | None:
    """None where it is not for the kernel. bits: as `compiled_attention`."""
    rows, grouping = weight.rows, steps.index_of(weight.row_map)
    if isinstance(rows, PackedRows):
        matrix = rows.matrix
        if bias is not None or matrix is None or not rows.is_tiled:
            return None
        bases, deltas = (ctypes.cast(stacks, ctypes.c_void_p) for stacks in (matrix.bases, matrix.deltas))
        return Projection(
            inputs=matrix.inputs, outputs=matrix.outputs, grouping=grouping, bases=bases, deltas=deltas,
            base_of=rows.versions.base.data_ptr(), delta_of=rows.versions.delta.data_ptr(), bits=bits[0],
            coarse=bits[1] < bits[0],
        )  # fmt: skip
    _, outputs, inputs = rows.shape
    if why_not_grouped(rows.dtype, [inputs]) or not rows.is_contiguous():
        return None
    biases = None if bias is None else bias.rows
    if bias is not None and biases is not None:
        if bias.row_map is not weight.row_map or isinstance(biases, PackedRows):
            return None
        if biases.dtype != torch.bfloat16 or not biases.is_contiguous():
            return None
    assert not isinstance(biases, PackedRows)
    return Projection(inputs=inputs, outputs=outputs, grouping=grouping, rows=rows.data_ptr(), bias=address(biases))


def norm_view(norm: tuple[Weight, float] | None, steps: StepViews) -> Norm | None:
    """None where it is not for the kernel."""
    if norm is None:
        return Norm()
    weight, eps = norm
    rows = weight.rows
    if isinstance(rows, PackedRows) or why_not_fast_norm(rows.dtype, rows.shape[-1]) or not rows.is_contiguous():
        return None
    return Norm(rows.data_ptr(), steps.index_of(weight.row_map), eps)
