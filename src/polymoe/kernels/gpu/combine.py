"""Sum of each token's weighted expert outputs, in a fixed order: the same input gives the same bits, without atomics.

    out_t = Σ_k y_(t, k)

Bytes moved: T · K · H float32 read, T · H written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def combine_rows(rows: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """`rows` float32 `[T · K, H]`, row t · K + k for (token t, k) and weighted already -> `[T, H]` in `dtype`."""
    assert rows.is_contiguous()
    assert rows.shape[0] % top_k == 0
    tokens, width = rows.shape[0] // top_k, rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    block = min(1024, max(16, triton.next_power_of_2(width)))
    _combine_kernel[(tokens, triton.cdiv(width, block))](rows, out, width, TOP_K=top_k, BLOCK=block, num_warps=4)
    return out


def combine_rows_torch(rows: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """The reference. Arguments as `combine_rows`."""
    return rows.view(-1, top_k, rows.shape[1]).sum(1).to(dtype)


@triton.jit
def _combine_kernel(rows_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(rows_ptr + (token * TOP_K + k) * width + column, mask=inside, other=0.0)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)
