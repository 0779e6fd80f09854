"""One layer's experts by the ids that its tables give: what every backend has that looks at them on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import experts_by_loop
from polymoe.kernels.cpu.routed_layer import RoutedLayer
from polymoe.model.backends.base import ExpertLayer, Routed
from polymoe.protocol.fast_path import FastPath


@dataclass(frozen=True)
class PackedExperts:
    """Packed pools, deltas, or stored experts beside absent ones.

    product: `experts_compressed`, or its reference. direct: the whole layer in one call, where there is one.
    """

    path: FastPath
    module: Any
    layer: ExpertLayer
    weights: CompressedLayer
    product: Callable[..., torch.Tensor]
    direct: RoutedLayer | None = None
    follows_tables: bool = False

    def __call__(self, hidden: torch.Tensor, routed: Routed) -> torch.Tensor:
        if self.direct is not None:
            out = self.direct(hidden, routed.token_variant, routed.experts, routed.gate)
            if out is not None:
                return out
        layer, entry = self.layer, (routed.token_variant[:, None], routed.experts)
        physical = layer.table[entry]
        if layer.num_absent:
            layer.absent.announce(physical)
        delta, sign = (None if table is None else table[entry] for table in (layer.delta, layer.sign))
        return self.product(
            self.module, hidden, physical, routed.token_variant, delta, sign, routed.gate, self.weights,
            layer.absent.weights_of,
        )  # fmt: skip


@dataclass(frozen=True)
class StoredExperts:
    """Stored experts without deltas.

    resident: `(module, hidden, physical, gate, stacks)`, for steps without absent experts; None: expert by expert.
    beside_absent: for steps with some; None: expert by expert.
    direct: the whole layer in one call, where there is one.
    """

    path: FastPath
    module: Any
    layer: ExpertLayer
    resident: Callable[..., torch.Tensor] | None
    beside_absent: PackedExperts | None = None
    direct: RoutedLayer | None = None
    follows_tables: bool = False

    def __call__(self, hidden: torch.Tensor, routed: Routed) -> torch.Tensor:
        if self.direct is not None:
            out = self.direct(hidden, routed.token_variant, routed.experts, routed.gate)
            if out is not None:
                return out
        layer = self.layer
        physical = layer.table[routed.token_variant[:, None], routed.experts]
        if self.resident is not None and (not layer.num_absent or bool((physical >= 0).all())):
            return self.resident(self.module, hidden, physical, routed.gate, layer.weights)
        if self.beside_absent is not None:
            return self.beside_absent(hidden, routed)
        layer.absent.announce(physical)
        return experts_by_loop(self.module, hidden, physical, routed.gate, layer.absent.weights_of)
