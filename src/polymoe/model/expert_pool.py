"""The physical experts of every layer, shared by all variants, and the tier behind them for those that are absent.

`table [V, L, E]` says for each (variant, layer, expert) which physical expert serves it: an index into the layer's
resident bases, or `-1 - h` for expert h of the layer's host tier. Sharing an expert is two entries with one value.
Where experts are packed or variants have deltas, `delta [V, L, E]` and `sign [V, L, E]` say what is added to the base.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from polymoe.kernels.compressed_experts import CompressedLayer, experts_compressed
from polymoe.kernels.fast_path import FastPath
from polymoe.kernels.grouped_experts import experts_by_group, experts_by_grouped_mm, experts_by_loop
from polymoe.kernels.grouped_linear import why_not_grouped
from polymoe.kernels.packed_experts import why_not_fused, why_not_packed
from polymoe.model.context import ForwardContext
from polymoe.model.expert_cache import ExpertCache, Weights
from polymoe.model.expert_store import ExpertStore, load_packed, load_tensor
from polymoe.model.mapped_experts import MappedExperts, MappedLayer, map_experts
from polymoe.model.staging import Staging
from polymoe.model.tier_measure import measure_tier_costs


class LayerExperts:
    """One layer's physical experts and its slices of the tables; attached to the stock experts module.

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
    ) -> None:
        self.layer, self.table, self.resident, self.cache, self.context = layer, table, resident, cache, ctx
        self.transposed = transposed
        self.compressed, self.delta, self.sign = compressed, delta, sign
        self.num_absent = max(0, -int(table.min()))  # host experts of the layer
        self.all_resident = self.num_absent == 0
        self.next: LayerExperts | None = None
        self.mapped: MappedLayer | None = None  # how decode steps read absent experts without waiting
        self._supported: bool | None = None
        # Stored experts in the form whose kernel computes them beside absent ones, on a CPU in bfloat16.
        here = cache.device.type == "cpu" and cache.dtype == torch.bfloat16 and ctx.kernels is None
        mixed = here and compressed is None and bool(resident) and not self.all_resident
        self._beside_absent = CompressedLayer(resident, (), (), transposed) if mixed else None

    def weights_of(self, module: Any, physical: int) -> Weights:
        """Tensors of a physical expert as the stock module has them: a view of the resident stack, or fetched."""
        if physical < 0:
            return self.cache.get(self.layer, -1 - physical)
        own = {name: stack[physical] for name, stack in self.resident.items()}
        if module.is_transposed and not self.transposed:
            own = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in own.items()}
        return own

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The layer's experts for `hidden [T, H]` with each variant's own routing `[T, K]`."""
        token_variant = self.context.batch.segments(hidden.shape[0]).token_variant
        if self._on_device(module):
            return self._forward_on_device(module, hidden, top_k_index, top_k_weights, token_variant)
        entry = token_variant[:, None], top_k_index
        physical = self.table[entry]
        weights_of = partial(self.weights_of, module)
        if self.compressed is not None:
            if not self.all_resident:
                self._announce(physical)
            delta = None if self.delta is None else self.delta[entry]
            sign = None if self.sign is None else self.sign[entry]
            return experts_compressed(
                module, hidden, physical, token_variant, delta, sign, top_k_weights, self.compressed, weights_of
            )
        if self.all_resident and hidden.is_cuda and hidden.dtype == torch.bfloat16:  # no kernel for this module
            return experts_by_grouped_mm(module, hidden, physical, top_k_weights, self.resident)
        if hidden.device.type == "cpu" and not self.transposed and (self.all_resident or bool((physical >= 0).all())):
            return experts_by_group(module, hidden, physical, top_k_weights, self.resident)
        self._announce(physical)
        if self._beside_absent is not None:
            return experts_compressed(
                module, hidden, physical, token_variant, None, None, top_k_weights, self._beside_absent, weights_of
            )
        return experts_by_loop(module, hidden, physical, top_k_weights, weights_of)

    def path(self, module: torch.nn.Module) -> FastPath:
        """What the layer's resident experts run on."""
        dtype = self.cache.dtype

        def path(runs_on: str, reason: str = "", slow: bool = False) -> FastPath:
            return FastPath(part="experts", runs_on=runs_on, count=1, reason=reason, slow=slow)

        if self._on_device(module):
            return path("GPU kernels")
        if self.context.kernels is not None or self.cache.device.type != "cpu":
            return path("torch", "the GPU kernels do not know this module", slow=True)
        if self.compressed is not None:
            if reason := why_not_packed(self.compressed):
                return path("torch packed", reason, slow=True)
            reason = why_not_fused(module, dtype, self.compressed)
            return path("compiled packed", reason and f"each product by itself: {reason}")
        if reason := why_not_grouped(dtype, [stack.shape[-1] for stack in self.resident.values() if stack.ndim == 3]):
            return path("torch stored", reason, slow=dtype == torch.bfloat16)  # 3 to 6 times; others have no kernel
        return path("compiled stored")

    def path_of_absent(self) -> FastPath | None:
        """What the layer's absent experts run on, in steps that need any."""
        if self.all_resident:
            return None
        reason = "fetched when they are needed, one at a time"
        return FastPath(part="absent experts", runs_on="torch", count=1, reason=reason)

    def _on_device(self, module: torch.nn.Module) -> bool:
        """Whether a GPU's kernels compute this layer; asked once."""
        if self.context.kernels is None:
            return False
        if self._supported is None:
            self._supported = self.context.kernels.supports_experts(module, self.compressed or self.resident)
        return self._supported

    def _forward_on_device(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        token_variant: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` by a GPU's kernels. The host waits only for absent experts that are not mapped, to learn which are
        needed."""
        kernels, tables = self.context.kernels, (self.table, self.delta, self.sign)
        assert kernels is not None
        if self.mapped is not None and self.context.batch.is_decode:
            self.mapped.count(token_variant, top_k_index)
            tables = (self.mapped.table, self.delta, self.sign)
            return kernels.experts(
                module, hidden, top_k_index, top_k_weights, token_variant, tables, self.mapped.weights, num_absent=0
            )
        weights = self.compressed or self.resident
        out = kernels.experts(
            module, hidden, top_k_index, top_k_weights, token_variant, tables, weights, self.num_absent
        )
        if self.all_resident:
            return out
        physical = self.table[token_variant[:, None], top_k_index]
        token, k = (physical < 0).nonzero(as_tuple=True)
        on_host = self._on_host(physical[token, k])
        self._announce(physical.index_put((token[on_host], k[on_host]), physical.new_zeros(())))
        absent = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        # First what the device computes, so that it is busy while the host computes the rest.
        for chosen, device, weights_of in (
            (~on_host, hidden.device, partial(self.weights_of, module)),
            (on_host, torch.device("cpu"), self._host_weights_of),
        ):
            rows, column = token[chosen], k[chosen]
            if len(rows):
                given = hidden[rows], physical[rows, column, None], top_k_weights[rows, column, None]
                x, ids, gate = (tensor.to(device) for tensor in given)
                own = experts_by_loop(module, x, ids, gate, weights_of)
                absent.index_add_(0, rows, own.to(hidden.device).float())
        return (absent + out).to(hidden.dtype)

    def _on_host(self, ids: torch.Tensor) -> torch.Tensor:
        """`[n]` bool: which of these (token, absent expert) pairs the host computes; one answer an expert."""
        found, which, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        answers = [self.cache.on_host(self.layer, -1 - expert, rows) for expert, rows in pairs]
        return torch.tensor(answers, dtype=torch.bool, device=ids.device)[which]

    def _host_weights_of(self, physical: int) -> Weights:
        found = self.cache.host_expert(self.layer, -1 - physical)
        return {name: tensor.to(self.cache.dtype) for name, tensor in found.items()}

    def _announce(self, physical: torch.Tensor) -> None:
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


class ExpertPool:
    """All layers' `LayerExperts`, loaded from a store.

    Args:
        dtype: what the experts are computed in; they are stored in it too.
        cache_bytes: budget for fetched experts, in bytes on the device.
        staging: brings the tensors to the device.
        progress: called with the fraction loaded.
        transposed: whether the stock modules hold experts as `[in, out]`. On a CPU they are turned over when they are
            loaded: every product here reads rows of outputs.
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
    ) -> None:
        turned = transposed and device.type == "cpu" and context.kernels is None
        table = store.table
        self.context = context
        self.table = table.to(device)
        self.delta = None if store.delta is None else store.delta.to(device)
        self.sign = None if store.sign is None else store.sign.to(device)
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
            delta, sign = (None if t is None or not compressed else t[:, layer] for t in (self.delta, self.sign))
            own = LayerExperts(
                layer, self.table[:, layer], resident, self.cache, context, compressed, delta, sign,
                transposed and not turned,
            )  # fmt: skip
            self.layers.append(own)
            progress((layer + 1) / table.shape[1])
        for layer_experts, following in itertools.pairwise(self.layers):
            layer_experts.next = following
        self.mapped: MappedExperts | None = None
        self.check_integrity()

    def map_absent(self, modules: Sequence[Any], top_k: int) -> None:
        """Let decode steps read absent experts without waiting, where that is possible; see `map_experts`."""
        self.mapped = map_experts(self, modules, top_k)

    def after_step(self) -> None:
        """Between two steps; waits for nothing."""
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


def polymoe_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function registered with transformers' experts registry under the name `polymoe`."""
    out: torch.Tensor = module.polymoe_experts.forward(module, hidden_states, top_k_index, top_k_weights)
    return out
