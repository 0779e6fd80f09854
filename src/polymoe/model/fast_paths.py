"""What every operation of a loaded model runs on, for its operator: see `polymoe.protocol.fast_path`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

from polymoe.model.attention.paged import AttentionLayer
from polymoe.model.backends.base import Backend
from polymoe.model.experts.layer import LayerExperts
from polymoe.model.per_variant.spec import PerVariantSpec
from polymoe.model.stock.fused_decoder_layer import why_not_one_call
from polymoe.model.stock.fused_norm import is_fused
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.model.variants.variant_stack import VariantStack
from polymoe.protocol.fast_path import FastPath, merged


def fast_paths(
    network: torch.nn.Module,
    backend: Backend,
    layers: Sequence[LayerExperts],
    attention: Iterable[AttentionLayer],
    dtype: torch.dtype,
    per_variant: Mapping[str, PerVariantSpec] = MappingProxyType({}),
) -> list[FastPath]:
    """Experts first, then linear maps, norms, attention and the modules at the paths `per_variant`, whose parts do not
    count; those that run alike as one."""
    paths = [layer.compute.path for layer in layers]
    paths += [path for layer in layers if (path := layer.path_of_absent()) is not None]
    alone = {part for path in per_variant for part in network.get_submodule(path).modules()}
    parts = [module for module in network.modules() if module not in alone]
    others = [*_linear_maps(parts, backend), *_norms(parts, backend), *_attention(attention, dtype, backend)]
    others += _decoder_layers(parts, backend) if backend.has_own_threads else []
    others += [_alone(network.get_submodule(path), spec) for path, spec in per_variant.items()]
    return merged([*paths, *others])


def _path(backend: Backend, part: str, reason: str) -> FastPath:
    """The backend's own way, unless there is a reason against it."""
    return FastPath(part=part, runs_on="torch" if reason else backend.runs_on, count=1, reason=reason)


def _linear_maps(modules: Iterable[torch.nn.Module], backend: Backend) -> Iterator[FastPath]:
    for module in modules:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        if isinstance(weight, PackedVariants):
            reason = backend.why_not_packed_linear(weight.dtype, weight.packed)
            runs_on = "torch packed" if reason else f"{backend.runs_on} packed"
            yield FastPath(part="linear", runs_on=runs_on, count=1, reason=reason, slow=bool(reason))
        elif isinstance(weight, VariantStack):
            reason = backend.why_not_linear(weight.dtype, weight.shape[1])
            runs_on = "torch" if reason else backend.multiplies_on
            yield FastPath(part="linear", runs_on=runs_on, count=1, reason=reason)
        else:
            reason = "the same in all variants, one product of torch's"
            yield FastPath(part="linear", runs_on="torch", count=1, reason=reason)


def _norms(modules: Iterable[torch.nn.Module], backend: Backend) -> Iterator[FastPath]:
    for module in modules:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or "norm" not in type(module).__name__.lower():
            continue
        if is_fused(module):
            yield _path(backend, "norm", backend.why_not_norm(weight.dtype, weight.shape[0]))
        else:
            kind = type(module).__name__
            yield FastPath(part="norm", runs_on="torch", count=1, reason=f"{kind} is not the kernel's formula")


def _attention(layers: Iterable[AttentionLayer], dtype: torch.dtype, backend: Backend) -> Iterator[FastPath]:
    for layer in layers:
        reason = backend.why_not_attention(dtype, layer.key_dim, layer.value_dim, layer.extras)
        yield _path(backend, "attention", reason)


def _decoder_layers(modules: Iterable[torch.nn.Module], backend: Backend) -> Iterator[FastPath]:
    lists = [module for module in modules if isinstance(module, torch.nn.ModuleList)]
    for layer in (layer for layers in lists for layer in layers):
        if any(hasattr(module, "polymoe_experts") for module in layer.modules()):
            reason = why_not_one_call(layer)
            runs_on = f"{backend.runs_on}, one call" if not reason else "the stock module's operations"
            yield FastPath(part="layer", runs_on=runs_on, count=1, reason=reason)


def _alone(module: torch.nn.Module, spec: PerVariantSpec) -> FastPath:
    how = "once for each variant of a step" + (" and once for all that decode" if spec.joint else "")
    reason = f"{type(module).__name__} is stock code, which runs {how}"
    return FastPath(part="per-variant", runs_on="torch", count=1, reason=reason)
