"""A whole attention layer in one call on a CPU: what the kernel is told of its weights and of a step."""

import ctypes

import torch

from polymoe.kernels.cpu.attention_layer import HeadNorm, LayerView, Projection, StepView, Versions, attention_layer
from polymoe.kernels.cpu.grouped_linear import why_not_grouped
from polymoe.kernels.cpu.packed_pool import TiledPool
from polymoe.kernels.cpu.packed_stack import address
from polymoe.kernels.cpu.paged_attention import why_not_attention
from polymoe.kernels.cpu.rms_norm import why_not_fast_norm
from polymoe.model.backends.base import AttentionParts, CachedLayer
from polymoe.model.batch.batch import ForwardBatch, RowMap
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.model.variants.variant_stack import VariantStack


class StepViews:
    """What the kernel is told of the step that is under way, for all layers of a model."""

    def __init__(self) -> None:
        self._row_maps: list[RowMap | None] = []
        self._last: tuple[ForwardBatch, int, StepView] | None = None

    def index_of(self, row_map: RowMap | None) -> int:
        """By which number layers refer to it; None: all tokens use the one version there is."""
        for index, known in enumerate(self._row_maps):
            if known is row_map:
                return index
        self._row_maps.append(row_map)
        return len(self._row_maps) - 1

    def of(self, batch: ForwardBatch) -> StepView:
        """Made once a step."""
        if self._last is None or self._last[0] is not batch or self._last[1] != len(self._row_maps):
            where = batch.attention
            assert where is not None
            versions = [_versions(batch, row_map) for row_map in self._row_maps]
            tokens = where.token_sequence, where.token_visible
            view = StepView(versions, where.slot_mapping, where.block_table, *tokens)
            self._last = batch, len(self._row_maps), view
        return self._last[2]


def _versions(batch: ForwardBatch, row_map: RowMap | None) -> Versions:
    tokens = batch.tokens
    if row_map is None:
        zeros = torch.zeros(tokens.num_tokens, dtype=torch.int64)
        return Versions(zeros[:1], torch.tensor([0, tokens.num_tokens]), zeros)
    groups = tokens.row_groups(row_map)
    return Versions(groups.ids, groups.starts, tokens.row_of_token(row_map))


def _versions_of(weight: torch.Tensor | None) -> tuple[torch.Tensor | None, RowMap | None]:
    """A weight's versions `[R, …]` and who has which; of a plain one the one that all have."""
    if isinstance(weight, VariantStack):
        return weight.rows, weight.row_map
    return (None if weight is None else weight[None]), None


class CompiledAttention:
    """See the module docstring.

    Args:
        bits: that rows are rounded to where they meet packed weights, before the base and before deltas.
    """

    def __init__(self, parts: AttentionParts, steps: StepViews, bits: tuple[int, int]) -> None:
        self._parts, self._steps, self._bits = parts, steps, bits
        self._seen: list[torch.Tensor | None] = []  # that `_view` was made of
        self._view: LayerView | None = None

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], batch: ForwardBatch, layer: CachedLayer
    ) -> torch.Tensor | None:
        """See the base class."""
        seen = [*self._weights(), *layer.cache]
        if len(seen) != len(self._seen) or any(a is not b for a, b in zip(seen, self._seen, strict=True)):
            self._seen, self._view = seen, self._described(layer)  # weights become stacks when a variant comes
        if self._view is None:
            return None
        return attention_layer(self._view, self._steps.of(batch), hidden.contiguous(), *rotary)

    def _weights(self) -> list[torch.Tensor | None]:
        found = [tensor for linear in self._parts.linears for tensor in (linear.weight, linear.bias)]
        return [*found, *(norm[0].weight for norm in self._parts.norms if norm is not None)]

    def _described(self, layer: CachedLayer) -> LayerView | None:
        """None where one of its parts is not for the kernel."""
        parts, (key, value) = self._parts, layer.cache
        block_size, kv_heads, key_dim = key.shape[1:]
        value_dim = value.shape[3]
        if why_not_attention(key.dtype, key_dim, value_dim) or key_dim != parts.head_dim:
            return None
        projections = [self._projection(linear) for linear in parts.linears]
        norms = [self._norm(norm) for norm in parts.norms]
        if None in projections or None in norms:
            return None
        return LayerView(
            *projections, *norms, key.data_ptr(), value.data_ptr(), block_size, parts.query.out_features // key_dim,
            kv_heads, key_dim, value_dim, layer.window or 0, parts.scaling,
        )  # fmt: skip

    def _projection(self, linear: torch.nn.Linear) -> Projection | None:
        weight, bias = linear.weight, linear.bias
        outputs, inputs = weight.shape
        sizes = {"inputs": inputs, "outputs": outputs}
        if isinstance(weight, PackedVariants):
            rows, matrix = weight.packed, weight.packed.matrix
            if bias is not None or matrix is None or not isinstance(rows.bases, TiledPool):
                return None
            bases, deltas = (ctypes.cast(stacks, ctypes.c_void_p) for stacks in (matrix.bases, matrix.deltas))
            return Projection(
                **sizes, grouping=self._steps.index_of(weight.row_map), bases=bases, deltas=deltas,
                one_base=rows.has_one_base, bits=self._bits[0], coarse=self._bits[1] < self._bits[0],
            )  # fmt: skip
        (stack, row_map), (biases, of_bias) = _versions_of(weight), _versions_of(bias)
        alike = bias is None or (row_map is of_bias and biases.dtype == torch.bfloat16 and biases.is_contiguous())
        if not alike or why_not_grouped(stack.dtype, [inputs]) or not stack.is_contiguous():
            return None
        return Projection(**sizes, rows=stack.data_ptr(), bias=address(biases), grouping=self._steps.index_of(row_map))

    def _norm(self, norm: tuple[torch.nn.Module, float] | None) -> HeadNorm | None:
        if norm is None:
            return HeadNorm()
        module, eps = norm
        weights, row_map = _versions_of(module.weight)
        if why_not_fast_norm(weights.dtype, weights.shape[-1]) or not weights.is_contiguous():
            return None
        return HeadNorm(weights.data_ptr(), self._steps.index_of(row_map), eps)
