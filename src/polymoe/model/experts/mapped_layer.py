"""One layer's absent experts where decode steps read them without waiting: see `mapped.py`."""

from collections.abc import Mapping

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import StoredPool
from polymoe.model.backends.base import PreparedExperts, Routed
from polymoe.model.experts.cache_policy import FrequencyPolicy

Weights = Mapping[str, torch.Tensor]


class MappedLayer:
    """One layer's absent experts.

    Args:
        table: `[V, E]` of the layer, −1 − h for host expert h.
        mapped: the same on the device for decode steps, without negative ids; written here.
        compressed: the layer's resident pools.
        host: name -> `[H, *shape]`, addressable by the device.
        rows: name -> `[C, *shape]` on the device.
    """

    def __init__(
        self, table: torch.Tensor, mapped: torch.Tensor, compressed: CompressedLayer, host: Weights, rows: Weights
    ) -> None:
        pools = [StoredPool(host), *([StoredPool(rows)] if rows else [])]
        bases = (*compressed.bases, *pools)
        self.weights = CompressedLayer(compressed.stored, bases, compressed.deltas, compressed.transposed)
        self.table, self.host, self.rows = mapped, host, rows
        self.num_host, self.num_rows = len(pools[0]), len(pools[1]) if rows else 0
        self.holder = [-1] * self.num_rows  # the host expert that is in each row
        self.policy = FrequencyPolicy(self.num_rows)
        self._absent = table
        self._first = compressed.num_bases
        # Steps that used each of these ids; behind them, whatever is resident.
        self.counts = torch.zeros(self.num_host + self.num_rows + 1, dtype=torch.int64, device=mapped.device)
        mapped.copy_(torch.where(table < 0, self._first - 1 - table, table))
        self.prepared: PreparedExperts  # for `weights` and `table`, set by `map_experts`

    def compute(self, hidden: torch.Tensor, routed: Routed) -> torch.Tensor:
        """A decode step's experts, absent or not."""
        self.count(routed.token_variant, routed.experts)
        return self.prepared(hidden, routed)

    def count(self, token_variant: torch.Tensor, top_k_index: torch.Tensor) -> None:
        """Note which experts a step uses. Padding repeats a row, so it adds nothing."""
        used = self.table[token_variant[:, None], top_k_index].flatten().long() - self._first
        used = torch.where(used < 0, len(self.counts) - 1, used)
        self.counts += torch.zeros_like(self.counts).index_fill_(0, used, 1)

    def point(self, expert: int, row: int | None) -> None:
        """Serve a host expert from a row, or (None) from the host."""
        place = expert if row is None else self.num_host + row
        self.table.masked_fill_(self._absent == -1 - expert, self._first + place)
