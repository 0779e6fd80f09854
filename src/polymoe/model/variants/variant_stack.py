"""One weight of a stock model, in several variants: a tensor subclass that picks each token's own row.

A `VariantStack` stands where a parameter stood and reports that parameter's shape, so the stock code of transformers
runs unchanged. It stores `rows [R, *shape]`. `__torch_function__` turns

- `linear` into one matmul for each run of rows of a variant (tokens are sorted by variant),
- `embedding` into a look-up in the flattened rows, offset by variant,
- adding, subtracting, multiplying and dividing with a token tensor into a gather of the row of each token,
- norms with a weight into the norm without one followed by those,
- a convolution of each channel by itself into one with each sequence's own weights, in a batch `[B, …]`,
- casts, arithmetic with a plain number, plain indexing and axes of one into the same on all rows.

Any other operation is an error that names it: never a silent wrong answer.

Which axis of a token tensor runs over the tokens is learned, not guessed. A norm may meet `[1, T, heads, D]` or
`[1, heads, T, D]`, and a step may happen to have as many tokens as the model has heads. So each stack remembers the
axis for each rank it has met; the trial run (`polymoe.model.stock.probe`) teaches it with a number of tokens that
nothing else has as its size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import RowMap

_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {}


class VariantStack(torch.Tensor):
    """See the module docstring.

    Args:
        rows: `[R, *shape]`, R stored tensors in place of a parameter of shape `shape`.
        row_map: which row serves which variant.
        context: the model's shared holder of the current batch.
        token_axes: number of axes of a token tensor that this weight meets -> its axis that runs over tokens. Learned
            at the first meeting that leaves no doubt; give what a trial run learned.
    """

    rows: torch.Tensor
    row_map: RowMap
    context: ForwardContext
    token_axes: dict[int, int]

    @staticmethod
    def __new__(
        cls, rows: torch.Tensor, row_map: RowMap, context: ForwardContext, token_axes: dict[int, int] | None = None
    ) -> "VariantStack":
        stack: VariantStack = torch.Tensor._make_wrapper_subclass(
            cls, rows.shape[1:], dtype=rows.dtype, device=rows.device, requires_grad=False
        )
        stack.rows, stack.row_map, stack.context = rows, row_map, context
        stack.token_axes = {} if token_axes is None else token_axes
        return stack

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"VariantStack(rows={self.rows.shape[0]}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def own_shape(self) -> torch.Size:
        """`shape`, without the detour that every attribute of a tensor subclass takes: for the hot paths."""
        return self.rows.shape[1:]

    def like(self, rows: torch.Tensor) -> "VariantStack":
        """The same variants with other rows."""
        return type(self)(rows, self.row_map, self.context, self.token_axes)

    def per_token(self, num_rows: int) -> torch.Tensor:
        """`[num_rows, *shape]`: the tensor of each row of tokens."""
        segments = self.context.batch.segments(num_rows)
        return self.context.backend.rows_of_tokens(self.rows, segments, self.row_map)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotImplementedError(
            f"{getattr(func, '__qualname__', func)} is not supported on weights that differ between variants"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} is not supported on weights that differ between variants")


METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_contiguous,
    torch.Tensor.element_size,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_sparse",
                     "is_quantized", "itemsize")
    ),
}  # fmt: skip


def _handles(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            _HANDLERS[function] = handler
        return handler

    return register


def _aligned(x: torch.Tensor, stack: VariantStack) -> tuple[int, ...]:
    """The weight's shape with axes of 1 at its left, as many as `x` has."""
    return (1,) * (x.ndim - len(stack.own_shape)) + stack.own_shape


def _token_axis(x: torch.Tensor, stack: VariantStack) -> int:
    """Axis of `x` that runs over tokens: where the weight, aligned at the right, has no axis or one of size 1."""
    batch = stack.context.batch
    counts = (batch.tokens.num_tokens, batch.sampled.num_tokens)
    own = _aligned(x, stack)
    possible = [axis for axis in range(x.ndim) if len(own) == x.ndim and own[axis] == 1 and x.shape[axis] in counts]
    learned = stack.token_axes.get(x.ndim)
    if learned is not None:
        if learned in possible:
            return learned
        raise RuntimeError(f"tokens were axis {learned}: tensor {tuple(x.shape)} against a weight {tuple(stack.shape)}")
    clear = [axis for axis in possible if x.shape[axis] > 1]
    if len(clear) == 1:
        return stack.token_axes.setdefault(x.ndim, clear[0])
    if not clear and possible:  # one token: all these axes have size 1 and mean the same
        return possible[0]
    reason = "several possible token axes" if clear else "no token axis"
    raise RuntimeError(f"{reason}: tensor {tuple(x.shape)} against a weight {tuple(stack.shape)}")


def _gathered(x: torch.Tensor, stack: VariantStack) -> torch.Tensor:
    """The stack's rows for the tokens of `x`, shaped to broadcast against it.

    `x [1, T, heads, D]` with a weight `[D]` gives `[1, T, 1, D]`, with one `[1, 1, heads, 1]` `[1, T, heads, 1]`.
    """
    shape = stack.context.batch.shape
    if shape is not None:
        count, own = shape[0] * shape[1], _aligned(x, stack)
        rows = stack.per_token(count)
        if not stack.own_shape and x.is_floating_point():
            rows = rows.to(x.dtype)
        if x.shape[:2] == shape:
            return rows.reshape(*shape, *own[2:])
        repeat, rest = divmod(x.shape[0], count)  # heads are folded into the rows: [B * L * heads, …]
        if rest or own[0] != 1:
            raise RuntimeError(f"{tuple(x.shape)} is not of the batch {shape}")
        return rows.repeat_interleave(repeat, dim=0).reshape(x.shape[0], *own[1:])
    axis = _token_axis(x, stack)
    count = x.shape[axis]
    rows = stack.per_token(count)
    if not stack.own_shape and x.is_floating_point():
        rows = rows.to(x.dtype)  # a scalar never raises the precision of what it meets
    return rows.reshape(count, *_aligned(x, stack)).movedim(0, axis).squeeze(axis + 1)


@_handles(F.linear)
def _linear(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    if not isinstance(weight, VariantStack):  # only the bias differs between variants
        out: torch.Tensor = F.linear(x, weight)
        return out + _gathered(out, bias)
    flat = x.reshape(-1, x.shape[-1])
    segments = weight.context.batch.segments(flat.shape[0])
    out = weight.context.backend.linear(flat.contiguous(), weight.rows, segments, weight.row_map)
    return with_bias(out, bias).view(*x.shape[:-1], weight.own_shape[0])


def with_bias(out: torch.Tensor, bias: Any) -> torch.Tensor:
    """`out [T, O]`, of all tokens of the batch in order, and a bias: each variant's own, one for all, or none."""
    if isinstance(bias, VariantStack):
        return out + bias.per_token(out.shape[0])
    return out if bias is None else out + bias


@_handles(F.embedding)
def _embedding(
    ids: torch.Tensor,
    weight: VariantStack,
    padding_idx: int | None = None,  # noqa: ARG001  (affects gradients only)
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    sparse: bool = False,  # noqa: ARG001
) -> torch.Tensor:
    if max_norm is not None:
        raise NotImplementedError("embedding with max_norm is not supported on weights that differ between variants")
    segments = weight.context.batch.segments(ids.numel())
    offsets = segments.row_of_token(weight.row_map) * weight.own_shape[0]
    return F.embedding(ids + offsets.view(ids.shape), weight.rows.view(-1, *weight.own_shape[1:]))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, torch.Tensor) and x.ndim == 0)


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def handler(a: Any, b: Any) -> torch.Tensor:
        if isinstance(a, VariantStack) and _is_number(b):
            return a.like(function(a.rows, b))
        if isinstance(b, VariantStack) and _is_number(a):
            return b.like(function(a, b.rows))
        if isinstance(a, VariantStack) and isinstance(b, VariantStack):
            if a.row_map is b.row_map and a.ndim == b.ndim:
                return a.like(function(a.rows, b.rows))
            raise NotImplementedError("two weights of different layout combined: not supported between variants")
        if isinstance(a, VariantStack):
            return function(_gathered(b, a), b)
        return function(a, _gathered(a, b))

    return handler


for _function, _names in (
    (torch.add, ("add", "__add__", "__radd__")),
    (torch.mul, ("mul", "__mul__", "__rmul__")),
    (torch.sub, ("sub", "__sub__")),
    (torch.div, ("div", "__truediv__")),
):
    _handles(_function, *(getattr(torch.Tensor, name) for name in _names))(_elementwise(_function))
_handles(torch.Tensor.__rsub__)(lambda a, b: _elementwise(torch.sub)(b, a))


def _in_place(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def handler(x: Any, stack: Any) -> torch.Tensor:
        if isinstance(x, VariantStack):
            raise NotImplementedError("a weight that differs between variants cannot be changed in place")
        return function(x, _gathered(x, stack))

    return handler


for _name in ("add_", "sub_", "mul_", "div_"):
    _handles(getattr(torch.Tensor, _name))(_in_place(getattr(torch.Tensor, _name)))


def _rowwise(method: Callable[..., torch.Tensor]) -> Callable[..., VariantStack]:
    def handler(stack: Any, *args: Any, **kwargs: Any) -> VariantStack:
        if not isinstance(stack, VariantStack):  # x.type_as(weight): the weight is an argument, not the subject
            raise NotImplementedError(f"{method} with a weight that differs between variants as its argument")
        rows = method(stack.rows, *args, **kwargs)
        return stack if rows is stack.rows else stack.like(rows)

    return handler


for _name in ("to", "float", "bfloat16", "half", "type", "type_as", "contiguous", "detach", "neg", "exp", "sigmoid"):
    _handles(getattr(torch.Tensor, _name))(_rowwise(getattr(torch.Tensor, _name)))
for _unary in (torch.neg, torch.exp, torch.sigmoid):
    _handles(_unary)(_rowwise(_unary))


@_handles(torch.Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(stack: VariantStack, dim: int) -> VariantStack:
    return stack.like(stack.rows.unsqueeze(dim + 1 if dim >= 0 else dim))


@_handles(torch.Tensor.squeeze, torch.squeeze)
def _squeeze(stack: VariantStack, dim: int | None = None) -> VariantStack:
    shape = list(stack.shape)
    if dim is None:
        shape = [size for size in shape if size != 1]
    elif shape[dim] == 1:
        del shape[dim]
    return stack.like(stack.rows.reshape(stack.rows.shape[0], *shape))


@_handles(torch.Tensor.__getitem__)
def _getitem(stack: VariantStack, index: Any) -> torch.Tensor:
    """`weight[:, None]` of all rows, or `weight[ids]` with `ids [T, …]` from each token's own row."""
    if (
        isinstance(stack, VariantStack)
        and isinstance(index, torch.Tensor)
        and index.dtype in (torch.int32, torch.int64)
    ):
        segments = stack.context.batch.segments(index.shape[0] if index.ndim else 0)
        first = segments.row_of_token(stack.row_map) * stack.own_shape[0]
        within = index % stack.own_shape[0]  # a negative index counts from the end of its own row
        return stack.rows.flatten(0, 1)[within + first.view(-1, *(1,) * (index.ndim - 1))]
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(stack, VariantStack) or not all(p is None or p is ... or type(p) in (int, slice) for p in parts):
        raise NotImplementedError("this indexing is not supported on weights that differ between variants")
    return stack.like(stack.rows[(slice(None), *parts)])


@_handles(F.layer_norm, torch.layer_norm)
def _layer_norm(
    x: torch.Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> torch.Tensor:
    out: torch.Tensor = F.layer_norm(x, normalized_shape, None, None, eps)
    return _affine(out, weight, bias)


@_handles(F.rms_norm)
def _rms_norm(x: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    out: torch.Tensor = F.rms_norm(x, normalized_shape, None, eps)
    return _affine(out, weight, None)


def _affine(out: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    if weight is not None:
        out = out * (_gathered(out, weight) if isinstance(weight, VariantStack) else weight)
    if bias is not None:
        out = out + (_gathered(out, bias) if isinstance(bias, VariantStack) else bias)
    return out


@_handles(F.conv1d, torch.conv1d)
def _conv1d(
    x: torch.Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`x [B, C, N]` with a weight `[C, 1, K]`: of each window with the weights of its sequence's variant."""
    stack = weight if isinstance(weight, VariantStack) else bias
    shape = stack.context.batch.shape
    numbers = [n[0] if isinstance(n, tuple | list) else n for n in (stride, padding, dilation)]
    plain = numbers[0] == numbers[2] == 1 and isinstance(numbers[1], int) and groups == x.shape[1] == weight.shape[0]
    if shape is None or x.shape[0] != shape[0] or not plain:
        raise NotImplementedError("this convolution (conv1d) is not supported on weights that differ between variants")

    def own(part: Any) -> torch.Tensor:  # [B or 1, C, 1, …]
        one = part.per_token(shape[0] * shape[1])[:: shape[1]] if isinstance(part, VariantStack) else part[None]
        return one.float().reshape(*one.shape[:2], 1, -1)

    windows = F.pad(x, (numbers[1], numbers[1])).float().unfold(-1, weight.shape[-1], 1)  # [B, C, N', K]
    out = (windows * own(weight)).sum(dim=-1)
    return (out if bias is None else out + own(bias)[..., 0]).to(x.dtype)
