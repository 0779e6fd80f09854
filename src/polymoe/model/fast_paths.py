"""What every operation of a loaded model runs on, for its operator: see `polymoe.kernels.fast_path`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from polymoe.kernels.fast_path import FastPath, merged
from polymoe.kernels.grouped_linear import why_not_grouped
from polymoe.kernels.paged_attention import why_not_attention
from polymoe.kernels.rms_norm import why_not_fast_norm
from polymoe.model.fused_norm import is_fused
from polymoe.model.skeleton import expert_modules
from polymoe.model.variant_stack import VariantStack

if TYPE_CHECKING:
    from polymoe.model.served_model import ServedModel


def fast_paths(model: "ServedModel") -> list[FastPath]:
    """Experts first, then linear maps, norms and attention; those that run alike as one."""
    experts = [module for _, module in expert_modules(model.model)]
    paths = [layer.path(module) for layer, module in zip(model.pool.layers, experts, strict=True)]
    paths += [path for layer in model.pool.layers if (path := layer.path_of_absent()) is not None]
    others = [*_linear_maps(model), *_norms(model), *_attention(model)]
    return merged([*paths, *others])


def _compiled(model: "ServedModel", part: str, reason: str) -> FastPath:
    """A path that is compiled unless there is a reason against it; on a GPU we know of none."""
    if model.context.kernels is not None:
        return FastPath(part=part, runs_on="GPU kernels", count=1)
    return FastPath(part=part, runs_on="torch" if reason else "compiled", count=1, reason=reason)


def _linear_maps(model: "ServedModel") -> Iterator[FastPath]:
    for module in model.model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        if isinstance(weight, VariantStack):
            yield _compiled(model, "linear", why_not_grouped(weight.dtype, [weight.shape[1]]))
        else:
            reason = "the same in all variants, one product of torch's"
            yield FastPath(part="linear", runs_on="torch", count=1, reason=reason)


def _norms(model: "ServedModel") -> Iterator[FastPath]:
    for module in model.model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or "norm" not in type(module).__name__.lower():
            continue
        if is_fused(module):
            yield _compiled(model, "norm", why_not_fast_norm(weight.dtype, weight.shape[0]))
        else:
            kind = type(module).__name__
            yield FastPath(part="norm", runs_on="torch", count=1, reason=f"{kind} is not the kernel's formula")


def _attention(model: "ServedModel") -> Iterator[FastPath]:
    for layer in model.attention_layers.values():
        reason = why_not_attention(model.dtype, layer.key_dim, layer.value_dim) or " and ".join(layer.extras)
        yield _compiled(model, "attention", reason)
