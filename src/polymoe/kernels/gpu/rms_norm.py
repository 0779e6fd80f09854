"""Root-mean-square norm on a GPU, each token with its own variant's weight: `rms_norm.rms_norm` row by row.

y_r = w_v(r) ∘ round(x_r / sqrt(mean(x_r²) + eps))
"""

import torch
import triton
import triton.language as tl

from polymoe.kernels.cpu.rms_norm import rms_norm


@triton.jit
def _rms_norm(
    x, weights, own_row, out, eps, width, repeat, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    rounded = (values * scale).to(out.dtype.element_ty)
    own = weights
    if HAS_ROWS:
        own += tl.load(own_row + row // repeat).to(tl.int64) * width
    weight = tl.load(own + columns, mask=inside, other=0.0)
    result = weight.to(tl.float32) * rounded.to(tl.float32)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


def rms_norm_gpu(
    x: torch.Tensor, weights: torch.Tensor, own_row: torch.Tensor | None, repeat: int, eps: float
) -> torch.Tensor:
    """The norm of every row of `x`; never waits for the device.

    Args:
        x: `[..., H]` with S rows in all, contiguous.
        weights: `[R, H]`, contiguous, in x's dtype.
        own_row: `[S / repeat]` integers, the weight of each run of `repeat` rows; None: the first for all.
    """
    assert x.is_contiguous()
    assert weights.is_contiguous()
    assert x.dtype == weights.dtype
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x, weights, own_row, out, eps, width, repeat, HAS_ROWS=own_row is not None, BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
    return out


def rms_norm_torch(
    x: torch.Tensor, weights: torch.Tensor, own_row: torch.Tensor | None, repeat: int, eps: float
) -> torch.Tensor:
    """The reference. Arguments as `rms_norm_gpu`."""
    own = weights[:1] if own_row is None else weights[own_row].repeat_interleave(repeat, dim=0)
    rows = x.view(-1, x.shape[-1])
    return rms_norm(rows, own, eps).view(x.shape)
