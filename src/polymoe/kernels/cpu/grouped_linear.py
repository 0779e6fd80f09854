"""Grouped linear: rows of x that belong to different weights, in one call.

    y_r = W_g(r) x_r + b_g(r)

Letters: S rows, G groups, P stored weights, I inputs, O outputs. `grouped_linear_by_loop` is the reference (one matmul
a group, any device and dtype). On a CPU bfloat16 goes to the compiled kernel (grouped_linear.cpp) where there is one,
which reads each weight once at close to the memory's speed. Both sum in float32 and round once.
"""

from collections.abc import Iterable, Sequence

import torch

from polymoe.native.library import cpu_kernels, kernel_threads, why_no_kernels

_LANES = 32
Offsets = Sequence[int] | torch.Tensor  # on the CPU; int64 tensors spare the kernel a conversion


def grouped_linear(
    x: torch.Tensor, stack: torch.Tensor, ids: Offsets, starts: Offsets, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Group g is rows `starts[g] : starts[g + 1]` of `x` and uses `stack[ids[g]]`.

    Args:
        x: `[S, I]`, contiguous.
        stack: `[P, O, I]`.
        ids: G row indices of the stack.
        starts: G + 1 ascending offsets from 0 to S; a group may be empty.
        bias: `[P, O]` or None.

    Returns: `[S, O]` in x's dtype.
    """
    if not isinstance(starts, torch.Tensor):  # comparing tensors costs more than a small product
        assert starts[0] == 0
        assert starts[-1] == x.shape[0]
    kernels = cpu_kernels() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else None
    if kernels is None or x.shape[1] % _LANES or not (x.is_contiguous() and stack.is_contiguous()):
        return grouped_linear_by_loop(x, stack, ids, starts, bias)
    out = x.new_empty(x.shape[0], stack.shape[1])
    index, offsets = torch.as_tensor(ids, dtype=torch.int64), torch.as_tensor(starts, dtype=torch.int64)
    bias = None if bias is None else bias.contiguous()
    kernels.polymoe_grouped_linear_bf16(
        x.data_ptr(), x.shape[1], stack.shape[1], len(index), index.data_ptr(), offsets.data_ptr(), stack.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out


def why_not_grouped(dtype: torch.dtype, inputs: Iterable[int]) -> str:
    """Why the compiled kernel does not multiply by weights of these many inputs on a CPU; empty where it does."""
    if dtype != torch.bfloat16:
        return f"{str(dtype).removeprefix('torch.')}, which torch multiplies"
    odd = sorted({size for size in inputs if size % _LANES})
    if odd and cpu_kernels() is not None:
        return f"{', '.join(map(str, odd))} inputs, no multiple of {_LANES}"
    return why_no_kernels()


def grouped_linear_by_loop(
    x: torch.Tensor, stack: torch.Tensor, ids: Offsets, starts: Offsets, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference: one matmul a group. Arguments as `grouped_linear`."""
    rows_of, bounds = (v.tolist() if isinstance(v, torch.Tensor) else v for v in (ids, starts))
    if len(rows_of) == 1:
        return torch.nn.functional.linear(x, stack[rows_of[0]], None if bias is None else bias[rows_of[0]])
    out = x.new_empty(x.shape[0], stack.shape[1])
    for g, row in enumerate(rows_of):
        rows = slice(bounds[g], bounds[g + 1])
        if bias is None:
            torch.mm(x[rows], stack[row].t(), out=out[rows])
        else:
            torch.addmm(bias[row], x[rows], stack[row].t(), out=out[rows])
    return out
