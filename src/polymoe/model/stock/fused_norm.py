"""Norms in one kernel call instead of six operations.

transformers writes root-mean-square norms out in elementary operations, which on a CPU cost more than their arithmetic.
Which modules are such norms is not read off their names: a module is tried, on random numbers, against the formula.
"""

import copy
import inspect
from typing import Any

import torch

from polymoe.kernels.cpu.rms_norm import rms_norm
from polymoe.model.backends.base import Backend
from polymoe.model.variants.variant_stack import VariantStack

_EPSILONS = ("variance_epsilon", "eps")


def fuse_norms(model: torch.nn.Module, backend: Backend) -> int:
    """Give every module that computes `rms_norm`, bit for bit, the backend's. Returns how many there are."""
    fused = 0
    for module in model.modules():
        eps = epsilon_of(module)
        if eps is not None and _is_rms_norm(module, eps):
            module.forward = _FusedNorm(module, eps, backend)
            fused += 1
    return fused


def epsilon_of(module: torch.nn.Module) -> float | None:
    """What a module that may be a norm has as its epsilon."""
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)


def norm_epsilon(module: torch.nn.Module) -> float | None:
    """Of a norm that `fuse_norms` took; None for any other module."""
    return module.forward.eps if isinstance(module.forward, _FusedNorm) else None


def is_fused(module: torch.nn.Module) -> bool:
    """Whether `fuse_norms` took this module for such a norm."""
    return isinstance(module.forward, _FusedNorm)


def _is_rms_norm(module: torch.nn.Module, eps: float) -> bool:
    weight = getattr(module, "weight", None)
    others = [name for name in module._parameters if name != "weight"]
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or others or next(module.children(), None):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # it may be given a gate as well
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
        except (RuntimeError, TypeError):  # it has a bias, or wants something else
            return False
        if not isinstance(out, torch.Tensor) or not torch.equal(out, rms_norm(x, plain, eps)):
            return False
    return True


class _FusedNorm:
    """The forward of one norm: the backend's, or the stock one where rows are not those of the tokens in order."""

    def __init__(self, module: Any, eps: float, backend: Backend) -> None:
        self.module, self.eps, self.backend, self.stock = module, eps, backend, module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.module.weight
        if x.dtype == weight.dtype:
            if not isinstance(weight, VariantStack):
                return self.backend.rms_norm(x, weight[None], None, self.eps)
            batch = weight.context.batch
            count = batch.shape and batch.shape[0] * batch.shape[1]
            if count is None and x.ndim >= 3 and x.shape[0] == 1 and weight.token_axes.get(x.ndim) == 1:
                count = x.shape[1]  # [1, T, …, H]
            if count is not None:
                stacked = batch.segments(count), weight.row_map
                return self.backend.rms_norm(x, weight.rows, stacked, self.eps)
        stock: torch.Tensor = self.stock(x)
        return stock
