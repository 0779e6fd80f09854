"""One matrix of a stock model in several variants, packed: what `VariantStack` is for weights as they are stored.

It stands where a parameter stood and reports that parameter's shape and the dtype that is computed in. The stock code
may multiply by it (`linear`) or look rows up in it (`embedding`), and ask for its shape; anything else is an error that
names the operation. Which matrices meet nothing else the trial run tells when a family is planned
(`polymoe.model.stock.probe`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import RowMap
from polymoe.model.variants.variant_stack import METADATA, with_bias


class PackedVariants(torch.Tensor):
    """See the module docstring.

    Args:
        packed: the versions. row_map: which row of them serves which variant.
        context: the model's shared holder of the current batch. dtype: of what is computed.
    """

    packed: PackedRows
    row_map: RowMap
    context: ForwardContext
    own_dtype: torch.dtype

    @staticmethod
    def __new__(
        cls, packed: PackedRows, row_map: RowMap, context: ForwardContext, dtype: torch.dtype
    ) -> "PackedVariants":
        weight: PackedVariants = torch.Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=dtype, device=packed.device, requires_grad=False
        )
        weight.packed, weight.row_map, weight.context, weight.own_dtype = packed, row_map, context, dtype
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedVariants(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotImplementedError(f"{getattr(func, '__qualname__', func)} is not supported on packed weights")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} is not supported on packed weights")


def _linear(x: torch.Tensor, weight: PackedVariants, bias: Any = None) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    segments = weight.context.batch.segments(flat.shape[0])
    out = weight.context.backend.packed_linear(flat.contiguous(), weight.packed, segments, weight.row_map)
    return with_bias(out, bias).view(*x.shape[:-1], out.shape[-1])


def _embedding(
    ids: torch.Tensor,
    weight: PackedVariants,
    padding_idx: int | None = None,  # noqa: ARG001  (affects gradients only)
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    sparse: bool = False,  # noqa: ARG001
) -> torch.Tensor:
    if max_norm is not None:
        raise NotImplementedError("embedding with max_norm is not supported on packed weights")
    rows = weight.context.batch.segments(ids.numel()).row_of_token(weight.row_map)
    return weight.packed.looked_up(ids, rows.view(ids.shape).long()).to(weight.own_dtype)
