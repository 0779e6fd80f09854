"""Every operation a `VariantStack` knows, against the plain weight of each token's variant, token by token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import ForwardBatch, RowMap, segments_from_variants
from polymoe.model.variants.variant_stack import VariantStack

NUM_VARIANTS = 6

# (variants, tokens of each): what traffic looks like
TRAFFIC = {
    "one variant": ([3], [9]),
    "one token": ([2], [1]),
    "uniform": ([0, 1, 2, 3, 4, 5], [3, 3, 3, 3, 3, 3]),
    "zipf": ([0, 1, 2, 3, 4, 5], [23, 11, 7, 3, 2, 1]),
    "all distinct": ([0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]),
    "absent variants": ([1, 4], [5, 2]),
}
ROW_MAPS = {
    "identity": [0, 1, 2, 3, 4, 5],
    "permuted": [4, 2, 0, 5, 1, 3],
    "shared": [0, 0, 1, 1, 0, 2],
}


@dataclass(frozen=True)
class Operation:
    """`run(x, *weights)` with `x` of `shape`, where T stands for the tokens at `axis`."""

    run: Callable[..., torch.Tensor]
    shape: tuple[int | str, ...]
    weights: tuple[tuple[int, ...], ...]
    ids: int = 0  # x holds ids below this

    @property
    def axis(self) -> int:
        return self.shape.index("T")

    def input(self, num_tokens: int) -> torch.Tensor:
        shape = [num_tokens if size == "T" else int(size) for size in self.shape]
        return torch.randint(0, self.ids, shape) if self.ids else torch.randn(shape)


def rms_norm(x: torch.Tensor, weight: Any) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


OPERATIONS = {
    "linear": Operation(F.linear, (1, "T", 10), ((7, 10),)),
    "linear with bias": Operation(F.linear, (1, "T", 10), ((7, 10), (7,))),
    "linear of rows": Operation(F.linear, ("T", 10), ((7, 10), (7,))),
    "linear in float32": Operation(lambda x, w: F.linear(x.float(), w.float()), ("T", 10), ((7, 10),)),
    "linear, only its bias differs": Operation(
        lambda x, b: F.linear(x, torch.linspace(-1, 1, 70).view(7, 10), b), (1, "T", 10), ((7,),)
    ),
    "linear, its bias is shared": Operation(lambda x, w: F.linear(x, w, torch.arange(7.0)), (1, "T", 10), ((7, 10),)),
    "embedding": Operation(F.embedding, (1, "T"), ((40, 8),), ids=40),
    "look-up": Operation(lambda ids, w: w[ids], ("T", 2), ((40,),), ids=40),
    "look-up of rows": Operation(lambda ids, w: w[ids - 40], ("T", 2), ((40, 3),), ids=40),
    "add": Operation(lambda x, w: x + w, (1, "T", 8), ((8,),)),
    "add on the right": Operation(lambda x, w: torch.add(w, x), (1, "T", 8), ((8,),)),
    "subtract": Operation(lambda x, w: x - w, ("T", 8), ((8,),)),
    "subtract from": Operation(lambda x, w: w - x, ("T", 8), ((8,),)),
    "multiply": Operation(lambda x, w: x * w, (1, "T", 8), ((8,),)),
    "divide": Operation(lambda x, w: x / w, (1, "T", 8), ((8,),)),
    "in place": Operation(lambda x, w: x.clone().mul_(w).add_(w), (1, "T", 8), ((8,),)),
    "numbers": Operation(lambda x, w: x * (1 + w.float()) - (2.0 - w) / 3, (1, "T", 8), ((8,),)),
    "two of one": Operation(lambda x, w: x * (w + w.neg().exp()), (1, "T", 8), ((8,),)),
    "sigmoid": Operation(lambda x, w: x * torch.sigmoid(w), (1, "T", 8), ((8,),)),
    "scalar": Operation(lambda x, w: x * w, (1, "T", 8), ((),)),
    "scalar of one element": Operation(lambda x, w: x * w, (1, "T", 8), ((1,),)),
    "norm": Operation(rms_norm, (1, "T", 8), ((8,),)),
    "norm of heads, tokens first": Operation(rms_norm, (1, "T", 4, 8), ((8,),)),
    "norm of heads, heads first": Operation(rms_norm, (1, 4, "T", 8), ((8,),)),
    "norm of one head, heads first": Operation(rms_norm, (1, 1, "T", 8), ((8,),)),
    "weight of heads": Operation(lambda x, w: x * w[None, None, :, None], (1, "T", 4, 8), ((4,),)),
    "part of a weight": Operation(lambda x, w: x + w[1, 2:], ("T", 6), ((2, 8),)),
    "unsqueeze": Operation(lambda x, w: x * w.unsqueeze(-1).unsqueeze(0), (1, "T", 4, 8), ((4,),)),
    "squeeze": Operation(lambda x, w: x + w.squeeze(), ("T", 8), ((1, 8),)),
    "squeeze one axis": Operation(lambda x, w: x + w.squeeze(0).squeeze(-1), ("T", 8), ((1, 8),)),
    "layer norm": Operation(lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), (1, "T", 8), ((8,), (8,))),
    "layer norm without bias": Operation(lambda x, w: F.layer_norm(x, (8,), w), (1, "T", 8), ((8,),)),
    "rms norm": Operation(lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (1, "T", 8), ((8,),)),
}


def make_context(variants: list[int], counts: list[int], sampled: list[int] | None = None) -> ForwardContext:
    context = ForwardContext()
    rows = segments_from_variants(variants, [min(1, c) for c in counts] if sampled is None else sampled)
    context.set(ForwardBatch(tokens=segments_from_variants(variants, counts), sampled=rows))
    return context


def make_stack(context: ForwardContext, shape: tuple[int, ...], rows: list[int] | None = None) -> VariantStack:
    row_map = RowMap(list(range(NUM_VARIANTS)) if rows is None else rows)
    return VariantStack(torch.randn(NUM_VARIANTS, *shape), row_map, context)


def by_token(
    operation: Operation, x: torch.Tensor, stacks: list[VariantStack], token_variant: list[int]
) -> torch.Tensor:
    """The slow reference: each token alone, with the plain weights of its variant."""
    pieces = []
    for token, variant in enumerate(token_variant):
        weights = [stack.rows[stack.row_map.rows[variant]] for stack in stacks]
        pieces.append(operation.run(x.narrow(operation.axis, token, 1), *weights))
    return torch.cat(pieces, dim=operation.axis)


@pytest.mark.parametrize("rows", ROW_MAPS)
@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_uses_each_tokens_own_weight(name: str, traffic: str, rows: str) -> None:
    torch.manual_seed(0)
    operation, (variants, counts) = OPERATIONS[name], TRAFFIC[traffic]
    context = make_context(variants, counts)
    stacks = [make_stack(context, shape, ROW_MAPS[rows]) for shape in operation.weights]
    token_variant = [v for v, count in zip(variants, counts, strict=True) for _ in range(count)]
    x = operation.input(len(token_variant))
    got = operation.run(x, *stacks)
    want = by_token(operation, x, stacks, token_variant)
    assert not isinstance(got, VariantStack)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampled", [[1, 1], [3, 0], [4, 2]])
def test_rows_kept_for_the_head_use_their_own_variants(sampled: list[int]) -> None:
    torch.manual_seed(0)
    context = make_context([1, 4], [5, 3], sampled)
    stack = make_stack(context, (7, 8))
    x = torch.randn(1, sum(sampled), 8)
    want = torch.cat([F.linear(x[:, : sampled[0]], stack.rows[1]), F.linear(x[:, sampled[0] :], stack.rows[4])], dim=1)
    torch.testing.assert_close(F.linear(x, stack), want)


def test_as_many_tokens_as_heads() -> None:
    """A model that normalises `[1, heads, T, D]` gave each head another variant's weight when T was the head count."""
    torch.manual_seed(0)
    axes: dict[int, int] = {}
    trial = VariantStack(torch.randn(2, 8), RowMap([0, 1]), make_context([0, 1], [5, 6]), axes)
    rms_norm(torch.randn(1, 4, 11, 8), trial)
    assert axes == {4: 2}

    operation = OPERATIONS["norm of heads, heads first"]
    context = make_context([0, 1], [1, 3])
    stack = VariantStack(trial.rows, RowMap([0, 1]), context, axes)
    x = torch.randn(1, 4, 4, 8)
    torch.testing.assert_close(rms_norm(x, stack), by_token(operation, x, [stack], [0, 1, 1, 1]))

    untaught = VariantStack(trial.rows, RowMap([0, 1]), context)
    with pytest.raises(RuntimeError, match="several possible token axes"):
        rms_norm(x, untaught)


def test_a_weight_met_in_two_layouts_is_an_error() -> None:
    stack = make_stack(make_context([0, 1], [5, 6]), (8,))
    rms_norm(torch.randn(1, 4, 11, 8), stack)
    with pytest.raises(RuntimeError, match="tokens were axis 2"):
        rms_norm(torch.randn(1, 11, 4, 8), stack)


def test_a_scalar_keeps_the_precision_of_what_it_meets() -> None:
    stack = make_stack(make_context([0, 1], [2, 3]), ())
    assert (torch.randn(5, 4, dtype=torch.bfloat16) * stack).dtype == torch.bfloat16


def test_a_slot_that_was_loaded_anew_is_seen() -> None:
    context = make_context([0, 1], [2, 3])
    row_map = RowMap([0, 1, -1])
    stack = VariantStack(torch.arange(2.0).view(2, 1), row_map, context)
    x = torch.zeros(5, 1)
    assert (x + stack).flatten().tolist() == [0, 0, 1, 1, 1]
    row_map.assign(0, 1)
    row_map.assign(1, 0)
    assert (x + stack).flatten().tolist() == [1, 1, 0, 0, 0]
    row_map.assign(1, -1)
    with pytest.raises(RuntimeError, match="in no slot"):
        _ = x + stack


def test_a_stack_looks_like_the_parameter_it_stands_for() -> None:
    stack = make_stack(make_context([0], [3]), (7, 8))
    assert stack.shape == (7, 8)
    assert (stack.ndim, stack.numel(), stack.dtype, stack.device.type) == (2, 56, torch.float32, "cpu")
    assert stack.to(torch.bfloat16).dtype == torch.bfloat16
    assert stack.float() is stack
    assert "rows=6" in repr(stack)


def test_tensors_without_the_batchs_tokens_are_an_error() -> None:
    stack = make_stack(make_context([0, 1], [2, 3]), (8, 8))
    with pytest.raises(RuntimeError, match="7 rows"):
        F.linear(torch.randn(7, 8), stack)
    with pytest.raises(RuntimeError, match="no token axis"):
        torch.randn(7, 8, 8) * stack
    with pytest.raises(RuntimeError, match="no token axis"):
        torch.randn(8) * stack
    context = ForwardContext()
    with pytest.raises(RuntimeError, match="no batch is set"):
        F.linear(torch.randn(5, 8), make_stack(context, (8, 8)))


UNKNOWN = {
    "matmul": lambda x, w: torch.matmul(x, w),
    "addmm": lambda x, w: torch.addmm(torch.zeros(8), x, w),
    "conv1d": lambda x, w: torch.conv1d(x[None], w.unsqueeze(-1)),
    "cat": lambda x, w: torch.cat([x, w]),
    "split": lambda _, w: w.split(4),
    "transpose": lambda _, w: w.transpose(0, 1),
    "sum": lambda _, w: w.sum(),
    "view": lambda _, w: w.view(-1),
    "where": lambda x, w: torch.where(w > 0, x, x),
    "copy_": lambda x, w: x.clone().copy_(w),
    "indexing": lambda _, w: w[torch.ones(8, dtype=torch.bool)],
    "in place": lambda x, w: w.add_(x),
    "type_as": lambda x, w: x.type_as(w),
    "max_norm": lambda _, w: F.embedding(torch.zeros(5, dtype=torch.int64), w, max_norm=1.0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_is_an_error_that_names_it(name: str) -> None:
    stack = make_stack(make_context([0, 1], [2, 3]), (8, 8))
    with pytest.raises(NotImplementedError, match=name if name != "where" else "gt|where"):
        UNKNOWN[name](torch.randn(5, 8), stack)


def test_two_weights_that_vary_in_different_ways_do_not_combine() -> None:
    context = make_context([0, 1], [2, 3])
    first, second = make_stack(context, (8,)), make_stack(context, (8,), ROW_MAPS["shared"])
    with pytest.raises(NotImplementedError, match="two weights"):
        _ = first * second


@pytest.mark.parametrize("row_map", ROW_MAPS.values(), ids=ROW_MAPS)
def test_sequences_of_a_batch_are_convolved_and_scaled_each_by_its_variant(row_map: list[int]) -> None:
    """Rows `[B, …]`, and `[B * heads, …]` where heads are folded into them."""
    owners, context = [0, 2, 2, 5], ForwardContext()
    tokens = segments_from_variants(owners, [1] * len(owners))
    context.set(ForwardBatch(tokens=tokens, sampled=tokens, shape=(len(owners), 1)))
    kernels, biases, scales = torch.randn(6, 3, 1, 4), torch.randn(6, 3), torch.randn(6, 8)
    own = RowMap(row_map)
    x, folded = torch.randn(4, 3, 7), torch.randn(4 * 5, 8)
    kernel, bias, scale = (VariantStack(rows, own, context) for rows in (kernels, biases, scales))
    out = F.conv1d(x, kernel, bias, padding=2, groups=3)
    scaled = folded * scale
    for i, owner in enumerate(owners):
        row = row_map[owner]
        alone = F.conv1d(x[i : i + 1], kernels[row], biases[row], padding=2, groups=3)
        torch.testing.assert_close(out[i : i + 1], alone)
        torch.testing.assert_close(scaled[5 * i : 5 * i + 5], folded[5 * i : 5 * i + 5] * scales[row])
    with pytest.raises(RuntimeError, match="is not of the batch"):
        torch.randn(6, 8) * scale
    with pytest.raises(NotImplementedError, match="convolution"):
        F.conv1d(x, kernel, None, stride=2, groups=3)
