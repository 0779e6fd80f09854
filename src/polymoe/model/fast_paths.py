"""What every operation of a loaded model runs on, for its operator: see `polymoe.protocol.fast_path`."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from polymoe.kernels.cpu.grouped_linear import why_not_grouped
from polymoe.kernels.cpu.paged_attention import why_not_attention
from polymoe.kernels.cpu.rms_norm import why_not_fast_norm
from polymoe.model.attention.paged import AttentionLayer
from polymoe.model.experts.layer import LayerExperts
from polymoe.model.stock.fused_norm import is_fused
from polymoe.model.stock.skeleton import expert_modules
from polymoe.model.variants.variant_stack import VariantStack
from polymoe.protocol.fast_path import FastPath, merged


def fast_paths(
    network: torch.nn.Module,
    layers: Sequence[LayerExperts],
    attention: Iterable[AttentionLayer],
    dtype: torch.dtype,
    by_gpu: bool,
) -> list[FastPath]:
    """Experts first, then linear maps, norms and attention; those that run alike as one.

    by_gpu: whether a GPU's kernels compute.
    """
    experts = [module for _, module in expert_modules(network)]
    paths = [layer.path(module) for layer, module in zip(layers, experts, strict=True)]
    paths += [path for layer in layers if (path := layer.path_of_absent()) is not None]
    others = [*_linear_maps(network, by_gpu), *_norms(network, by_gpu), *_attention(attention, dtype, by_gpu)]
    return merged([*paths, *others])


def _compiled(by_gpu: bool, part: str, reason: str) -> FastPath:
    """A path that is compiled unless there is a reason against it; on a GPU we know of none."""
    if by_gpu:
        return FastPath(part=part, runs_on="GPU kernels", count=1)
    return FastPath(part=part, runs_on="torch" if reason else "compiled", count=1, reason=reason)


def _linear_maps(network: torch.nn.Module, by_gpu: bool) -> Iterator[FastPath]:
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        if isinstance(weight, VariantStack):
            yield _compiled(by_gpu, "linear", why_not_grouped(weight.dtype, [weight.shape[1]]))
        else:
            reason = "the same in all variants, one product of torch's"
            yield FastPath(part="linear", runs_on="torch", count=1, reason=reason)


def _norms(network: torch.nn.Module, by_gpu: bool) -> Iterator[FastPath]:
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or "norm" not in type(module).__name__.lower():
            continue
        if is_fused(module):
            yield _compiled(by_gpu, "norm", why_not_fast_norm(weight.dtype, weight.shape[0]))
        else:
            kind = type(module).__name__
            yield FastPath(part="norm", runs_on="torch", count=1, reason=f"{kind} is not the kernel's formula")


def _attention(layers: Iterable[AttentionLayer], dtype: torch.dtype, by_gpu: bool) -> Iterator[FastPath]:
    for layer in layers:
        reason = why_not_attention(dtype, layer.key_dim, layer.value_dim) or " and ".join(layer.extras)
        yield _compiled(by_gpu, "attention", reason)
