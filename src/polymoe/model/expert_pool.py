"""The physical experts of every layer, shared by all variants, and the tier behind them for those that are absent.

`table [V, L, E]` says for each (variant, layer, expert) which physical expert serves it: an index into the layer's
resident stack, or `-1 - h` for expert h of the layer's host tier. Sharing an expert is two entries with one value.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from polymoe.kernels.grouped_experts import experts_by_group, experts_by_grouped_mm, experts_by_loop
from polymoe.model.context import ForwardContext

Weights = Mapping[str, torch.Tensor]


class ExpertStore(Protocol):
    """Where experts come from; a bundle is one."""

    @property
    def table(self) -> torch.Tensor:
        """`[V, L, E]` int32."""

    def resident_experts(self, layer: int) -> dict[str, torch.Tensor]:
        """Name -> `[P_l, *shape]`."""

    def host_expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        """Name -> `[*shape]`, read lazily."""


@dataclass
class TierStats:
    """What fetching absent experts cost. A hit found the expert in the cache; bytes are those read from the host."""

    hits: int = 0
    misses: int = 0
    host_bytes: int = 0
    seconds: float = 0.0


class ExpertCache:
    """Fetched experts, least recently used first out, within a byte budget.

    An expert larger than the whole budget is used and dropped (Algorithm 2 of the paper is budget 0).
    """

    def __init__(self, store: ExpertStore, budget: int, device: torch.device, dtype: torch.dtype) -> None:
        self.store, self.budget, self.device, self.dtype = store, budget, device, dtype
        self.used = 0
        self.stats = TierStats()
        self._experts: OrderedDict[tuple[int, int], dict[str, torch.Tensor]] = OrderedDict()

    def get(self, layer: int, index: int) -> Weights:
        """The tensors of expert `index` of the layer's host tier, on the device."""
        key = (layer, index)
        cached = self._experts.get(key)
        if cached is not None:
            self._experts.move_to_end(key)
            self.stats.hits += 1
            return cached
        started = time.perf_counter()
        source = self.store.host_expert(layer, index)
        fetched = {name: t.to(self.device, self.dtype, copy=True) for name, t in source.items()}
        self.stats.misses += 1
        self.stats.host_bytes += sum(t.numel() * t.element_size() for t in source.values())
        size = sum(t.numel() * t.element_size() for t in fetched.values())
        if size <= self.budget:
            while self.used + size > self.budget:
                _, dropped = self._experts.popitem(last=False)
                self.used -= sum(t.numel() * t.element_size() for t in dropped.values())
            self._experts[key] = fetched
            self.used += size
        self.stats.seconds += time.perf_counter() - started
        return fetched


class LayerExperts:
    """One layer's physical experts and its slice of the table; attached to the stock experts module."""

    def __init__(
        self,
        layer: int,
        table: torch.Tensor,
        resident: dict[str, torch.Tensor],
        cache: ExpertCache,
        ctx: ForwardContext,
    ) -> None:
        self.layer, self.table, self.resident, self.cache, self.context = layer, table, resident, cache, ctx
        self.all_resident = bool((table >= 0).all())

    def weights_of(self, physical: int) -> Weights:
        """Tensors of a physical expert: a view of the resident stack, or fetched."""
        if physical >= 0:
            return {name: stack[physical] for name, stack in self.resident.items()}
        return self.cache.get(self.layer, -1 - physical)

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The layer's experts for `hidden [T, H]` with each variant's own routing `[T, K]`."""
        token_variant = self.context.batch.segments(hidden.shape[0]).token_variant
        physical = self.table[token_variant[:, None], top_k_index]
        if self.all_resident and hidden.is_cuda and hidden.dtype == torch.bfloat16:
            return experts_by_grouped_mm(module, hidden, physical, top_k_weights, self.resident)
        if (
            hidden.device.type == "cpu"
            and not module.is_transposed
            and (self.all_resident or bool((physical >= 0).all()))
        ):
            return experts_by_group(module, hidden, physical, top_k_weights, self.resident)
        return experts_by_loop(module, hidden, physical, top_k_weights, self.weights_of)


class ExpertPool:
    """All layers' `LayerExperts`, loaded from a store.

    Args:
        dtype: what the experts are computed in; they are stored in it too.
        cache_bytes: budget for fetched experts, in bytes on the device.
        progress: called with the fraction loaded.
    """

    def __init__(
        self,
        store: ExpertStore,
        context: ForwardContext,
        device: torch.device,
        dtype: torch.dtype,
        cache_bytes: int,
        progress: Callable[[float], None],
    ) -> None:
        table = store.table
        self.table = table.to(device)
        self.cache = ExpertCache(store, cache_bytes, device, dtype)
        self.layers: list[LayerExperts] = []
        for layer in range(table.shape[1]):
            # copy=True: a tensor read from a memory-mapped file would otherwise stay on disk
            resident = {n: t.to(device, dtype, copy=True) for n, t in store.resident_experts(layer).items()}
            self.layers.append(LayerExperts(layer, self.table[:, layer], resident, self.cache, context))
            progress((layer + 1) / table.shape[1])
        self.check_integrity()

    @property
    def resident_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.resident.values())

    def check_integrity(self) -> None:
        """Every table entry points at an expert that exists."""
        for layer in self.layers:
            counts = {t.shape[0] for t in layer.resident.values()} or {0}
            assert len(counts) == 1, f"layer {layer.layer}: expert tensors disagree on their count {counts}"
            assert int(layer.table.max()) < counts.pop(), f"layer {layer.layer}: the table points past the pool"


def polymoe_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function registered with transformers' experts registry under the name `polymoe`."""
    out: torch.Tensor = module.polymoe_experts.forward(module, hidden_states, top_k_index, top_k_weights)
    return out
