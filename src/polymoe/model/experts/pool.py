"""The physical experts of every layer, shared by all variants, and the tier behind them for those that are absent.

`table [V, L, E]` says for each (variant, layer, expert) which physical expert serves it: an index into the layer's
resident bases, or `-1 - h` for expert h of the layer's host tier. Sharing an expert is two entries with one value.
Where experts are packed or variants have deltas, `delta [V, L, E]` and `sign [V, L, E]` say what is added to the base.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.model.backends.context import ForwardContext
from polymoe.model.experts.cache import ExpertCache
from polymoe.model.experts.layer import LayerExperts
from polymoe.model.experts.mapped import MappedExperts, map_experts
from polymoe.model.experts.routing_counts import RoutingCounts
from polymoe.model.experts.store import ExpertStore, load_packed, load_tensor
from polymoe.model.experts.tier_measure import measure_tier_costs
from polymoe.model.transfer.staging import Staging


class ExpertPool:
    """All layers' `LayerExperts`, loaded from a store.

    Args:
        dtype: what the experts are computed in; they are stored in it too.
        cache_bytes: budget for fetched experts, in bytes on the device.
        staging: brings the tensors to the device.
        progress: called with the fraction loaded.
        transposed: whether the stock modules hold experts as `[in, out]`. The backend may want them turned over when
            they are loaded (`holds_outputs_first`).
        more_places: of variants that come later (`AddedExperts`).
    """

    def __init__(
        self,
        store: ExpertStore,
        context: ForwardContext,
        device: torch.device,
        dtype: torch.dtype,
        cache_bytes: int,
        staging: Staging,
        progress: Callable[[float], None],
        transposed: bool = False,
        more_places: int = 0,
    ) -> None:
        turned = self.turned = transposed and context.backend.holds_outputs_first
        table = store.table
        self.context = context
        self.table = _with_places(table, more_places, 0).to(device)
        self.delta = None if store.delta is None else _with_places(store.delta, more_places, -1).to(device)
        self.sign = None if store.sign is None else _with_places(store.sign, more_places, 1).to(device)
        if more_places:  # who comes may have deltas where nobody has any yet
            self.delta = torch.full_like(self.table, -1) if self.delta is None else self.delta
            self.sign = torch.ones_like(self.table, dtype=torch.int8) if self.sign is None else self.sign
        self.routing_counts = RoutingCounts(self.table.shape, device)
        costs = None
        if device.type == "cuda" and bool((table < 0).any()):
            costs = measure_tier_costs(device, dtype, [tuple(shape) for shape in store.packed_shapes.values()])
        self.cache = ExpertCache(store.host_expert, cache_bytes, device, dtype, costs)
        self.layers: list[LayerExperts] = []
        for layer in range(table.shape[1]):
            # Always a copy: a tensor read from a memory-mapped file would otherwise stay on disk.
            stored = store.resident_experts(layer)
            if turned:
                stored = {n: t.transpose(1, 2) if t.ndim == 3 else t for n, t in stored.items()}
            resident = {n: load_tensor(t, device, staging, dtype) for n, t in stored.items()}
            compressed = load_packed(store, layer, resident, device, staging, transposed and not turned)
            if compressed is None and more_places:
                compressed = CompressedLayer(resident, (), (), transposed and not turned)
            delta, sign = (None if t is None or not compressed else t[:, layer] for t in (self.delta, self.sign))
            own = LayerExperts(
                layer, self.table[:, layer], resident, self.cache, context, compressed, delta, sign,
                transposed and not turned, self.routing_counts,
            )  # fmt: skip
            self.layers.append(own)
            store.drop_pages()
            progress((layer + 1) / table.shape[1])
        for layer_experts, following in itertools.pairwise(self.layers):
            layer_experts.next = following
        self.mapped: MappedExperts | None = None
        self.check_integrity()

    def map_absent(self, modules: Sequence[Any], top_k: int) -> None:
        """Let decode steps read absent experts without waiting, where that is possible; see `map_experts`."""
        self.mapped = map_experts(self.layers, self.table, self.cache, modules, top_k)

    def after_step(self) -> None:
        """Between two steps; waits for nothing."""
        self.routing_counts.after_step()
        if self.mapped is not None:
            self.mapped.after_step()

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device: `resident_experts`, `deltas` and `tables`."""
        compressed = [layer.compressed for layer in self.layers if layer.compressed is not None]
        stored = sum(t.numel() * t.element_size() for layer in self.layers for t in layer.resident.values())
        tables = [t for t in (self.table, self.delta, self.sign) if t is not None]
        return {
            "resident_experts": stored + sum(pool.num_bytes for layer in compressed for pool in layer.bases),
            "deltas": sum(pool.num_bytes for layer in compressed for pool in layer.deltas),
            "tables": sum(t.numel() * t.element_size() for t in tables),
        }

    def check_integrity(self) -> None:
        """Every table entry points at an expert that exists."""
        if self.mapped is not None:
            self.mapped.check_integrity()
        for layer in self.layers:
            counts = {t.shape[0] for t in layer.resident.values()} or {0}
            assert len(counts) == 1, f"layer {layer.layer}: expert tensors disagree on their count {counts}"
            compressed = layer.compressed
            num_bases = counts.pop() if compressed is None else compressed.num_bases
            assert int(layer.table.max()) < num_bases, f"layer {layer.layer}: the table points past the pool"
            if layer.delta is not None and compressed is not None:
                assert int(layer.delta.max()) < compressed.num_deltas, f"layer {layer.layer}: no such delta"
                assert bool((layer.table[layer.delta >= 0] >= 0).all()), (
                    f"layer {layer.layer}: a delta on a host expert"
                )


def _with_places(table: torch.Tensor, more: int, value: int) -> torch.Tensor:
    """`[V, L, E]` -> `[V + more, L, E]`."""
    return torch.cat([table, table.new_full((more, *table.shape[1:]), value)]) if more else table
