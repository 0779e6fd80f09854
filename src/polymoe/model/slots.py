"""Run-time partial reconfiguration: fewer slots than variants, and a variant's non-experts loaded when it is needed.

A slot is one row in every slot-managed stack. Loading copies the variant's own tensors into the row; tensors that all
variants share, or that have no more versions than there are slots, never move.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from polymoe.model.context import RowMap


@dataclass
class ReconfigurationStats:
    """Loads after the first fill of the slots: how many, how long (seconds) and how much (bytes)."""

    count: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass
class Slots:
    """S slots for V variants, least recently used out.

    Args:
        num_slots: S.
        row_map: shared by all slot-managed stacks; -1 while a variant is in no slot.
        read: (variant, tensor name) -> its tensor, from the host tier.
        stacks: name -> rows `[S, *shape]`.
    """

    num_slots: int
    row_map: RowMap
    read: Callable[[int, str], torch.Tensor]
    stacks: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: ReconfigurationStats = field(default_factory=ReconfigurationStats)

    def __post_init__(self) -> None:
        self._variant_of_slot: list[int] = [-1] * self.num_slots
        self._last_used: list[int] = [0] * self.num_slots
        self._clock = 0

    @property
    def loaded(self) -> frozenset[int]:
        """Variants that are in a slot now."""
        return frozenset(v for v in self._variant_of_slot if v >= 0)

    def fill(self) -> None:
        """Load the first S variants, at start-up (not counted as reconfigurations)."""
        for variant in range(self.num_slots):
            self._load(variant, variant)

    def ensure(self, variants: set[int]) -> None:
        """Bring every one of `variants` into a slot; those that are not asked for make room, oldest use first."""
        assert len(variants) <= self.num_slots, f"{len(variants)} variants for {self.num_slots} slots"
        self._clock += 1
        for variant in sorted(variants - self.loaded):
            free = [s for s in range(self.num_slots) if self._variant_of_slot[s] not in variants]
            slot = min(free, key=lambda s: self._last_used[s])
            started = time.perf_counter()
            moved = self._load(variant, slot)
            self.stats.count += 1
            self.stats.nbytes += moved
            self.stats.seconds += time.perf_counter() - started
        for slot, variant in enumerate(self._variant_of_slot):
            if variant in variants:
                self._last_used[slot] = self._clock

    def _load(self, variant: int, slot: int) -> int:
        previous = self._variant_of_slot[slot]
        if previous >= 0:
            self.row_map.assign(previous, -1)
        self._variant_of_slot[slot] = -1  # a failed read leaves an empty slot, never a mixed one
        moved = 0
        for name, rows in self.stacks.items():
            source = self.read(variant, name)
            copy_padded(rows[slot], source)
            moved += source.numel() * source.element_size()
        self._variant_of_slot[slot] = variant
        self.row_map.assign(variant, slot)
        return moved

    def check_integrity(self) -> None:
        """Slots and row map say the same."""
        for variant, row in enumerate(self.row_map.rows):
            in_slot = self._variant_of_slot.index(variant) if variant in self._variant_of_slot else -1
            assert row == in_slot, f"variant {variant}: row {row}, slot {in_slot}"


def copy_padded(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `target`, zeros after it where a variant has fewer vocabulary rows (axis 0)."""
    assert source.shape[1:] == target.shape[1:], f"{tuple(source.shape)} does not fit {tuple(target.shape)}"
    assert source.ndim == 0 or source.shape[0] <= target.shape[0], f"{tuple(source.shape)} into {tuple(target.shape)}"
    if source.shape == target.shape:
        target.copy_(source)
        return
    target[: source.shape[0]].copy_(source)
    target[source.shape[0] :].zero_()
