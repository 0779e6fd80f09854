"""What one layer's routed experts are stored as."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool, StoredPool, TiledPool
from polymoe.kernels.cpu.packed_stack import LayerStacks, describe

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class CompressedLayer:
    """One layer's physical bases and deltas.

    stored: tensor name -> `[P_0, *shape]`; the bases with the lowest ids.
    bases: further pools, whose ids follow in order. deltas: pools of deltas, numbered likewise from 0.
    transposed: whether stored experts are `[in, out]`; packed ones never are.
    """

    stored: Weights
    bases: tuple[PackedPool | StoredPool, ...]
    deltas: tuple[PackedPool | ExactPool, ...]
    transposed: bool = False

    @cached_property
    def stacks(self) -> LayerStacks | None:
        """What the compiled kernels are told of it; None if its tensors are not laid out as they read them."""
        return describe(self.stored, self.bases, self.deltas, self.transposed)

    @property
    def num_stored(self) -> int:
        return next(iter(self.stored.values())).shape[0]

    @property
    def is_tiled(self) -> bool:
        """Whether any pool is in tiles, which only one kernel multiplies."""
        return any(isinstance(pool, TiledPool) for pool in (*self.bases, *self.deltas))

    @property
    def num_bases(self) -> int:
        return self.num_stored + sum(len(pool) for pool in self.bases)

    @property
    def num_deltas(self) -> int:
        return sum(len(pool) for pool in self.deltas)
