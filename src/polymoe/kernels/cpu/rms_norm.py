"""Root-mean-square norm whose weight may differ from row to row.

y_r = w_v(r) ∘ round(x_r / sqrt(mean(x_r²) + eps))
"""

import torch

from polymoe.native.library import cpu_kernels, kernel_threads, why_no_kernels

_LANES = 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference, with one weight `[H]` for `x [..., H]`: float32 inside, rounded to x's dtype before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def why_not_fast_norm(dtype: torch.dtype, width: int) -> str:
    """Why the compiled kernel does not compute norms of this width on a CPU; empty where it does."""
    if dtype != torch.bfloat16:
        return str(dtype).removeprefix("torch.")
    return why_no_kernels() or (f"{width} values, no multiple of {_LANES}" if width % _LANES else "")


def fast_rms_norm(
    x: torch.Tensor, weights: torch.Tensor, weight_of: torch.Tensor | None, repeat: int, eps: float
) -> torch.Tensor:
    """The compiled kernel (rms_norm.cpp), for what `why_not_fast_norm` has no reason against.

    Args:
        x: `[..., H]` with S rows in all, contiguous.
        weights: `[R, H]`, contiguous.
        weight_of: `[S / repeat]` int64, the weight of each run of `repeat` rows; None: the first for all.
    """
    kernels, width = cpu_kernels(), x.shape[-1]
    assert kernels is not None
    assert x.dtype == weights.dtype == torch.bfloat16
    assert width % _LANES == 0
    assert x.is_contiguous()
    assert weights.is_contiguous()
    out = torch.empty_like(x)
    kernels.polymoe_rms_norm_bf16(
        x.data_ptr(), weights.data_ptr(), None if weight_of is None else weight_of.data_ptr(), repeat,
        x.numel() // width, width, eps, out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out
