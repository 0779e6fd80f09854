"""Norms in one kernel call instead of six operations.

transformers writes root-mean-square norms out in elementary operations, which on a CPU cost more than their arithmetic.
Which modules are such norms is not read off their names: a module is tried, on random numbers, against the formula.
"""

import copy
from typing import Any

import torch

from polymoe.kernels.rms_norm import fast_rms_norm, rms_norm
from polymoe.model.device_kernels import DeviceKernels
from polymoe.model.variant_stack import VariantStack

_EPSILONS = ("variance_epsilon", "eps")


def fuse_norms(model: torch.nn.Module, kernels: DeviceKernels | None = None) -> int:
    """Give every module that computes `rms_norm`, bit for bit, the fused forward. Returns how many there are.

    Args: `kernels`: what computes on a GPU; None: the compiled CPU kernels.
    """
    fused = 0
    for module in model.modules():
        found = (getattr(module, name, None) for name in _EPSILONS)
        eps = next((value for value in found if isinstance(value, float)), None)
        if eps is not None and _is_rms_norm(module, eps):
            module.forward = _FusedNorm(module, eps, kernels)
            fused += 1
    return fused


def is_fused(module: torch.nn.Module) -> bool:
    """Whether `fuse_norms` took this module for such a norm."""
    return isinstance(module.forward, _FusedNorm)


def _is_rms_norm(module: torch.nn.Module, eps: float) -> bool:
    weight = getattr(module, "weight", None)
    others = [name for name in module._parameters if name != "weight"]
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or others or next(module.children(), None):
        return False
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        trial = copy.copy(module)
        trial._parameters = {"weight": None}
        trial.__dict__.pop("weight", None)
        plain = torch.randn(weight.shape[0], generator=generator).to(dtype)
        trial._parameters["weight"] = torch.nn.Parameter(plain, requires_grad=False)
        x = (3 * torch.randn(1, 5, weight.shape[0], generator=generator)).to(dtype)
        try:
            out = trial(x)
        except (RuntimeError, TypeError):  # it wants more than one tensor
            return False
        if not isinstance(out, torch.Tensor) or not torch.equal(out, rms_norm(x, plain, eps)):
            return False
    return True


class _FusedNorm:
    """The forward of one norm: the kernel where it applies, else the stock one."""

    def __init__(self, module: Any, eps: float, kernels: DeviceKernels | None) -> None:
        self.module, self.eps, self.kernels, self.stock = module, eps, kernels, module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._fast(x) if self.kernels is None else self._on_device(x, self.kernels)
        stock: torch.Tensor = self.stock(x) if out is None else out
        return stock

    def _fast(self, x: torch.Tensor) -> torch.Tensor | None:
        weight = self.module.weight
        if not isinstance(weight, VariantStack):
            return fast_rms_norm(x, weight[None], None, 1, self.eps)
        shape = weight.context.batch.shape
        if shape is None and (x.ndim < 3 or x.shape[0] != 1 or weight.token_axes.get(x.ndim) != 1):  # [1, T, …, H]
            return None
        count = x.shape[1] if shape is None else shape[0] * shape[1]
        segments = weight.context.batch.segments(count)
        groups = segments.row_groups(weight.row_map)
        if len(groups.ids) == 1:
            return fast_rms_norm(x, weight.rows[int(groups.ids[0])][None], None, 1, self.eps)
        repeat = x.numel() // (count * x.shape[-1])
        return fast_rms_norm(x, weight.rows, segments.row_of_token(weight.row_map), repeat, self.eps)

    def _on_device(self, x: torch.Tensor, kernels: DeviceKernels) -> torch.Tensor | None:
        weight = self.module.weight
        if x.dtype != weight.dtype or not x.is_contiguous():
            return None
        if not isinstance(weight, VariantStack):
            return kernels.rms_norm(x, weight[None], None, 1, self.eps) if x.is_cuda else None
        if x.ndim < 3 or x.shape[0] != 1 or weight.token_axes.get(x.ndim) != 1:  # [1, T, …, H]
            return None
        version = weight.context.batch.segments(x.shape[1]).row_of_token(weight.row_map)
        repeat = x.numel() // (x.shape[1] * x.shape[-1])
        return kernels.rms_norm(x, weight.rows, version, repeat, self.eps)
