"""Routers in one kernel call instead of six operations.

As with norms (`fused_norm.py`), which modules are such routers is not read off their names: a module is tried, on
random numbers, against the formula.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.kernels.cpu.router import Scoring, choose
from polymoe.model.backends.base import Backend
from polymoe.model.variants.variant_stack import VariantStack


def fuse_routers(modules: Iterable[torch.nn.Module], backend: Backend) -> int:
    """Give every one that computes `choose` of its logits the backend's. Returns how many there are."""
    fused = 0
    for module in modules:
        weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not isinstance(top_k, int):
            continue
        if backend.why_not_route(weight.dtype, weight.shape[1]):
            continue
        found = _formula(module, top_k)
        if found is not None:
            module.forward = FusedRouter(module, found, backend)
            fused += 1
    return fused


@dataclass(frozen=True)
class _Formula:
    scoring: Scoring
    logits: torch.dtype
    scores: torch.dtype


def _formula(module: Any, top_k: int) -> _Formula | None:
    """None if it is no such router."""
    others = [
        name
        for name, tensor in (module._parameters | module._buffers).items()
        if name != "weight" and tensor is not None
    ]
    if others or any(True for _ in module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    experts, width = module.weight.shape
    trial = copy.copy(module)
    trial.__dict__.pop("weight", None)
    weight = torch.randn(experts, width, generator=generator).to(torch.bfloat16)
    trial._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False)}
    x = (torch.randn(7, width, generator=generator) / width**0.5).to(torch.bfloat16)
    try:
        found = trial(x)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it wants something else
        return None
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(t, torch.Tensor) for t in found):
        return None
    logits, scores, chosen = found
    own = F.linear(x, weight)
    if scores.shape != (7, top_k) or chosen.shape != (7, top_k) or chosen.dtype != torch.int64:
        return None
    best = own.topk(top_k, dim=-1).values  # of equal logits either may be taken
    if not torch.equal(own.gather(1, chosen), best) or not torch.equal(logits, own.to(logits.dtype)):
        return None
    for scoring in Scoring:
        _, wanted, _ = choose(own, top_k, scoring)
        if torch.equal(wanted.to(scores.dtype), scores):
            return _Formula(scoring, logits.dtype, scores.dtype)
    return None


class FusedRouter:
    """The forward of one router: the backend's, or the stock one where rows are not the step's tokens."""

    def __init__(self, module: Any, formula: _Formula, backend: Backend) -> None:
        self.module, self.formula, self.backend = module, formula, backend
        self.top_k, self.stock = module.top_k, module.forward

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        weight = self.module.weight
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if x.dtype != weight.dtype:
            return self.stock(hidden_states)
        if isinstance(weight, VariantStack):
            stacked = weight.context.batch.segments(len(x)), weight.row_map
            found = self.backend.route(x.contiguous(), weight.rows, stacked, self.top_k, self.formula.scoring)
        else:
            found = self.backend.route(x.contiguous(), weight[None], None, self.top_k, self.formula.scoring)
        logits, scores, chosen = found
        return logits.to(self.formula.logits), scores.to(self.formula.scores), chosen
