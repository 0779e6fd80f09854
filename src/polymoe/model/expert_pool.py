"""The physical experts of every layer, shared by all variants, and the tier behind them for those that are absent.

`table [V, L, E]` says for each (variant, layer, expert) which physical expert serves it: an index into the layer's
resident stack, or `-1 - h` for expert h of the layer's host tier. Sharing an expert is two entries with one value.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from polymoe.kernels.grouped_experts import experts_by_group, experts_by_grouped_mm, experts_by_loop
from polymoe.model.cache_policy import FrequencyPolicy
from polymoe.model.context import ForwardContext
from polymoe.model.slots import copy_padded

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
    prefetched: int = 0  # of the misses, fetched beside computation
    host_bytes: int = 0
    seconds: float = 0.0  # that the engine waited


Key = tuple[int, int]  # (layer, index in the layer's host list)


class ExpertCache:
    """Absent experts on the device, in a byte budget: what is used often is kept, what is needed next is on its way.

    A quarter of the budget (at most `MAX_STAGING` experts) stages what `expect` announced, fetched by a thread of its
    own while other experts compute; the rest keeps what the frequency policy chooses. With a budget below two experts
    an expert is fetched when needed and dropped after use (Algorithm 2 of the paper is budget 0).
    """

    MAX_STAGING = 8

    def __init__(self, store: ExpertStore, budget: int, device: torch.device, dtype: torch.dtype) -> None:
        self.store, self.budget, self.device, self.dtype = store, budget, device, dtype
        self.stats = TierStats()
        self._expert_bytes = 0  # on the device, each; known from the first one on
        self._host_bytes = 0  # as stored
        self._staging = 0
        self._policy = FrequencyPolicy(0)
        self._kept: dict[Key, Weights] = {}
        self._arriving: dict[Key, Future[Weights]] = {}
        self._expected: deque[Key] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polymoe-experts")

    @property
    def used(self) -> int:
        """Bytes held now."""
        return (len(self._kept) + len(self._arriving)) * self._expert_bytes

    def expect(self, keys: Iterable[Key]) -> None:
        """These experts are needed soon, in this order. What was expected before and is not among them is forgotten."""
        if not self._expert_bytes:
            self._measure(keys := list(keys))
        self._expected = deque(key for key in keys if key not in self._kept)
        wanted = set(self._expected)
        for key in [key for key in self._arriving if key not in wanted]:
            self._arriving.pop(key).cancel()
        self._pump()

    def get(self, layer: int, index: int) -> Weights:
        """The tensors of expert `index` of the layer's host tier, on the device."""
        key = (layer, index)
        if not self._expert_bytes:
            self._measure([key])
        if self._policy.access(key):
            self.stats.hits += 1
            return self._kept[key]
        started = time.perf_counter()
        arriving = self._arriving.pop(key, None)
        weights = self._fetch(key) if arriving is None else arriving.result()
        self.stats.misses += 1
        self.stats.prefetched += arriving is not None
        self.stats.host_bytes += self._host_bytes
        if key in self._policy:
            self._kept[key] = weights
            for dropped in [k for k in self._kept if k not in self._policy]:
                del self._kept[dropped]
        self._pump()
        self.stats.seconds += time.perf_counter() - started
        return weights

    def _measure(self, keys: list[Key]) -> None:
        """Size one expert, and share out the budget."""
        if not keys:
            return
        tensors = self.store.host_expert(*keys[0]).values()
        self._host_bytes = sum(t.numel() * t.element_size() for t in tensors)
        self._expert_bytes = sum(t.numel() for t in tensors) * torch.empty((), dtype=self.dtype).element_size()
        room = self.budget // self._expert_bytes
        self._staging = min(room // 4 or room // 2, self.MAX_STAGING)
        self._policy = FrequencyPolicy(room - self._staging)

    def _pump(self) -> None:
        while self._expected and len(self._arriving) < self._staging:
            key = self._expected.popleft()
            if key not in self._arriving and key not in self._kept:
                self._arriving[key] = self._worker.submit(self._fetch, key)

    def _fetch(self, key: Key) -> Weights:
        """Copy one expert to the device. May run beside a forward pass."""
        fetched = {}
        for name, source in self.store.host_expert(*key).items():
            fetched[name] = torch.empty(source.shape, dtype=self.dtype, device=self.device)
            copy_padded(fetched[name], source)
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
        self.next: LayerExperts | None = None

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
        self._announce(physical)
        return experts_by_loop(module, hidden, physical, top_k_weights, self.weights_of)

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
        for layer_experts, following in itertools.pairwise(self.layers):
            layer_experts.next = following
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
