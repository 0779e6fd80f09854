"""What an error of each matrix beside the experts costs, measured on text: κ of `error_on_text.py` for non-experts.

The probes run along in one more copy for each group of matrices (the projections of a layer; an embedding or a head by
itself) in which these alone are disturbed. Within a layer what was measured is divided as `nats_from_weights` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.nonexperts import layer_of, nats_from_weights
from polymoe.offline.plan.quantisation_error import FloatArray
from polymoe.offline.similarity.scan import FamilyScan

_NOISE = 0.05  # of a matrix's spread
# Groups are disturbed one by one; together, and on other text, they cost about so much more.
_TOGETHER = 1.5


@dataclass(frozen=True)
class Copies:
    """|-- text --|-- copy 0 --|-- copy 1 --| …: `total` copies of `probe` windows after `text` of them."""

    text: int
    probe: int
    total: int

    def part(self, whole: Tensor, copy: int) -> Tensor:
        """A view of one copy's part of what a module puts out: by window, or of the copies' tokens alone (a head)."""
        if whole.shape[0] == self.text + self.total * self.probe:
            start = self.text + copy * self.probe
            return whole[start : start + self.probe]
        size = whole.shape[1] // self.total
        return whole[:, copy * size : (copy + 1) * size]


class NonexpertProbes:
    """`groups`: the matrices of each copy. `kl` [G, V] is filled in by who compares the copies' logits."""

    def __init__(self, family: Family, scan: FamilyScan) -> None:
        self.family, self.prior = family, nats_from_weights(family, scan)
        by_place: dict[Any, list[str]] = {}
        for name in family.packable:
            inside = name not in family.architecture.vocab_tensors
            by_place.setdefault(layer_of(name, scan.expert_modules) if inside else name, []).append(name)
        self.groups = list(by_place.values())
        self.kl = np.zeros((len(self.groups), len(family.names)))
        self._weight = np.zeros_like(self.kl)  # Σ prior · relative error put in

    def attach(self, model: Any, variant: int, copies: Copies, first: int) -> None:
        """Disturb group g of a variant's model in copy `first` + g."""
        tied = self.family.checkpoints[variant].tied
        for g, names in enumerate(self.groups):
            for name in names:
                for stands in (name, *(target for target, source in tied.items() if source == name)):
                    module = model.get_submodule(stands.rpartition(".")[0])
                    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                        hook = self._hook(g, variant, name, copies, first + g)
                        # Before the hook that takes the weights out again.
                        module.register_forward_hook(hook, prepend=True)

    def _hook(self, group: int, variant: int, name: str, copies: Copies, copy: int) -> Callable[..., Tensor]:
        def disturb(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            weight = module.weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(group)) * _NOISE * weight.std()
            given = copies.part(args[0], copy)
            embeds = isinstance(module, torch.nn.Embedding)
            function = torch.nn.functional.embedding if embeds else torch.nn.functional.linear
            output = output.clone()
            copies.part(output, copy).add_(function(given, noise))
            relative = float(noise.square().sum() / weight.square().sum().clamp_min(1e-30))
            self._weight[group, variant] += float(self.prior[name][variant]) * relative
            return output

        return disturb

    def nats(self) -> dict[str, FloatArray]:
        """name -> float [V], as `QuantisationErrors.nonexpert_nats`; without matrices that no probe reached."""
        found: dict[str, FloatArray] = {}
        for g, names in enumerate(self.groups):
            if (self._weight[g] > 0).all():
                scale = _TOGETHER * self.kl[g] / self._weight[g]
                found |= {name: scale * self.prior[name] for name in names}
        return found
