"""Experts' matrices as [out, in], whatever way round the stock module holds them."""

from __future__ import annotations

from torch import Tensor

from polymoe.offline.checkpoint.architecture import build_on_meta
from polymoe.offline.checkpoint.family import Family


def is_transposed(family: Family) -> bool:
    """True when the stock module holds its matrices as [in, out]."""
    model = build_on_meta(family.config)
    return bool(model.get_submodule(family.architecture.expert_modules[0]).is_transposed)


def matrix_shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """The [out, in] under which a tensor of the stock per-expert `shape` is packed; a bias keeps its shape."""
    return shape[::-1] if transposed else tuple(shape)


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """One expert's tensor of the stock module as [out, in]; a bias as it is."""
    return weight.T.contiguous() if transposed and weight.ndim == 2 else weight


def mlp_order(tensors: list[str]) -> list[str]:
    """The tensors in the order in which the expert computes: what `down_proj` sees depends on all the others."""
    return sorted(tensors, key=lambda name: name.startswith("down_proj"))
