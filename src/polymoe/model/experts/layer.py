"""One layer's physical experts as the stock experts module calls them."""

from typing import Any

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.model.backends.base import Backend, ExpertLayer, PreparedExperts, Routed
from polymoe.model.backends.context import ForwardContext
from polymoe.model.experts.cache import ExpertCache, Weights
from polymoe.model.experts.mapped_layer import MappedLayer
from polymoe.model.experts.routing_counts import RoutingCounts
from polymoe.protocol.fast_path import FastPath


class LayerExperts:
    """One layer's physical experts and its slices of the tables; attached to the stock experts module.

    What computes them is the backend's (`prepare`); of those that are absent this is its `AbsentExperts`.
    `delta`, `sign` `[V, E]` and `compressed` are None where every resident expert is stored as it is, without deltas.
    `transposed`: whether `resident` is `[in, out]`.
    """

    def __init__(
        self,
        layer: int,
        table: torch.Tensor,
        resident: dict[str, torch.Tensor],
        cache: ExpertCache,
        ctx: ForwardContext,
        compressed: CompressedLayer | None = None,
        delta: torch.Tensor | None = None,
        sign: torch.Tensor | None = None,
        transposed: bool = False,
        counts: RoutingCounts | None = None,
    ) -> None:
        self.layer, self.table, self.resident, self.cache, self.context = layer, table, resident, cache, ctx
        self.transposed, self.counts = transposed, counts
        self.compressed, self.delta, self.sign = compressed, delta, sign
        self.num_absent = max(0, -int(table.min()))  # host experts of the layer
        self.all_resident = self.num_absent == 0
        self.next: LayerExperts | None = None
        self.mapped: MappedLayer | None = None  # how decode steps read absent experts without waiting
        self._turned = False  # whether the stock module holds experts the other way round
        self.compute: PreparedExperts

    def prepare(self, module: Any, backend: Backend) -> None:
        """Make what computes this layer, which the stock experts `module` stands for."""
        self._turned = bool(module.is_transposed) and not self.transposed
        if self.compressed is not None:
            self.compressed = backend.laid_out(module, self.compressed, self.cache.dtype)
        self.compute = backend.prepare_experts(module, self.described)

    @property
    def described(self) -> ExpertLayer:
        """What a backend is told of it."""
        return ExpertLayer(
            self.table, self.delta, self.sign, self.compressed or self.resident, self.transposed, self.cache.dtype,
            self.num_absent, self,
        )  # fmt: skip

    def forward(
        self, _module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The layer's experts for `hidden [T, H]` with each variant's own routing `[T, K]`."""
        batch = self.context.batch
        routed = Routed(batch.segments(hidden.shape[0]).token_variant, top_k_index, top_k_weights)
        if self.counts is not None and self.counts.counting:
            self.counts.count(self.layer, routed)
        if self.mapped is not None and batch.is_decode:
            return self.mapped.compute(hidden, routed)
        return self.compute(hidden, routed)

    def path_of_absent(self) -> FastPath | None:
        """What the layer's absent experts run on, in steps that need any."""
        if self.all_resident:
            return None
        reason = "fetched when they are needed, one at a time"
        return FastPath(part="absent experts", runs_on="torch", count=1, reason=reason)

    # AbsentExperts: what the backend asks of those that are not on the device.

    def weights_of(self, physical: int) -> Weights:
        """Tensors of a physical expert as the stock module has them: a view of the resident stack, or fetched."""
        if physical < 0:
            return self.cache.get(self.layer, -1 - physical)
        own = {name: stack[physical] for name, stack in self.resident.items()}
        return {n: t.T if t.ndim == 2 else t for n, t in own.items()} if self._turned else own

    def host_weights_of(self, physical: int) -> Weights:
        """Tensors of an absent expert where they are, in the dtype that is computed in."""
        found = self.cache.host_expert(self.layer, -1 - physical)
        return {name: tensor.to(self.cache.dtype) for name, tensor in found.items()}

    def on_host(self, physical: torch.Tensor) -> torch.Tensor:
        """`[n]` bool: which of these (token, absent expert) pairs the host computes; one answer an expert."""
        found, which, counts = torch.unique(physical, return_inverse=True, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        answers = [self.cache.on_host(self.layer, -1 - expert, rows) for expert, rows in pairs]
        return torch.tensor(answers, dtype=torch.bool, device=physical.device)[which]

    def announce(self, physical: torch.Tensor) -> None:
        """Tell the cache which absent experts this layer needs, in the loop's order, and the next one's after them.

        A pass with at least as many (token, expert) pairs as experts touches nearly all of them (prefill): then the
        next layer's are known before its router has run.
        """
        needed = [(self.layer, -1 - p) for p in torch.unique(physical).tolist() if p < 0]
        if self.next is not None and physical.numel() >= self.table.shape[1]:
            present = [variant for variant, _, _ in self.context.batch.segments(physical.shape[0]).spans]
            coming = torch.unique(self.next.table[present])
            needed += [(self.next.layer, -1 - p) for p in coming.tolist() if p < 0]
        self.cache.expect(needed)


def polymoe_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function registered with transformers' experts registry under the name `polymoe`."""
    out: torch.Tensor = module.polymoe_experts.forward(module, hidden_states, top_k_index, top_k_weights)
    return out
