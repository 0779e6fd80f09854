"""Room on the device for experts that are not there yet: one more pool of a layer, allocated with the planned ones.

    bases   |-- planned 0 … P − 1 --|-- room P … P + R − 1 --|-- pools of variants that found no room --|

Where steps are captured as graphs the pool is in them from the start. So an expert that comes is copied into a row, and
the tables, which graphs read anew each time, begin to name it: no address changes.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from polymoe.kernels.cpu.packed_pool import StoredPool


class ExpertRoom:
    """R rows of one layer. `first`: the id of row 0. `take` and `give_back` belong between two steps."""

    def __init__(self, like: Mapping[str, torch.Tensor], count: int, first: int) -> None:
        """`like`: name -> `[P, *shape]`, the layer's experts as they are stored."""
        self.first = first
        self.pool = StoredPool({n: torch.empty(count, *t.shape[1:], dtype=t.dtype, device=t.device)
                                for n, t in like.items()})  # fmt: skip
        self._free = list(range(count))[::-1]

    def take(self, count: int) -> tuple[int, ...] | None:
        """Rows that nobody has; None where there are not so many."""
        if count > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(count))

    def give_back(self, rows: Sequence[int]) -> None:
        self._free += rows

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def expert_bytes(self) -> int:
        return self.pool.num_bytes // max(1, len(self.pool))


def expert_bytes(stored: Mapping[str, torch.Tensor]) -> int:
    """Of one of the experts name -> `[P, *shape]`, whatever P is."""
    return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in stored.values())
