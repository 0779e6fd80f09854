"""The tier behind the pool: experts that are absent from the device, fetched when routed to and kept while useful."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from polymoe.model.experts.cache_policy import FrequencyPolicy
from polymoe.model.experts.link import ExpertLink, SentExpert
from polymoe.model.experts.tier_cost import TierCosts

Weights = Mapping[str, torch.Tensor]
_USES_WHEN_KEPT = 2.0  # of an expert that enters a cache with room, at least: or the policy would not keep it


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

    `host_expert(layer, index)` gives an expert of the host tier: name -> `[*shape]`. `costs`: of this machine, where
    the host may compute experts too.
    """

    MAX_STAGING = 8

    def __init__(
        self,
        host_expert: Callable[[int, int], Weights],
        budget: int,
        device: torch.device,
        dtype: torch.dtype,
        costs: TierCosts | None = None,
    ) -> None:
        self.host_expert, self.budget, self.device, self.dtype = host_expert, budget, device, dtype
        self.costs = costs
        self._link = ExpertLink(device)
        self.stats = TierStats()
        self._expert_bytes = 0  # on the device, each; known from the first one on
        self._host_bytes = 0  # as stored
        self._staging = 0
        self._policy = FrequencyPolicy(0)
        self._kept: dict[Key, Weights] = {}
        self._arriving: dict[Key, Future[SentExpert]] = {}
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
        weights = self._link.receive(self._fetch(key) if arriving is None else arriving.result())
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

    def on_host(self, layer: int, index: int, rows: int) -> bool:
        """Whether the host should compute `rows` rows of this expert rather than fetch it; never where it is kept or
        on its way. Without measured costs nothing is computed on the host."""
        key = (layer, index)
        if self.costs is None or key in self._kept or key in self._arriving:
            return False
        if not self._expert_bytes:
            self._measure([key])
        parameters = self._expert_bytes // self.dtype.itemsize
        uses = 1.0 if self._policy.room == 0 else _USES_WHEN_KEPT
        return self.costs.on_host(rows, self._host_bytes, parameters, uses)

    def _measure(self, keys: list[Key]) -> None:
        """Size one expert, and share out the budget."""
        if not keys:
            return
        tensors = self.host_expert(*keys[0]).values()
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

    def _fetch(self, key: Key) -> SentExpert:
        """Copy one expert to the device. May run beside a forward pass."""
        return self._link.send(self.host_expert(*key), self.dtype)
