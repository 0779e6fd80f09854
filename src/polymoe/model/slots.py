"""Run-time partial reconfiguration: fewer slots than variants, and a variant's non-experts loaded when it is needed.

A slot is one row in every slot-managed stack. Loading copies the variant's own tensors into the row; tensors that all
variants share, or that have no more versions than there are slots, never move. One row more than there are slots is the
staging row: the variant that runs next is copied there while the current batch computes, and the switch itself is then
an entry in the row map.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from polymoe.model.context import RowMap


@dataclass
class ReconfigurationStats:
    """Variants brought in after the first fill. `seconds` is what the engine waited for them, `nbytes` what moved."""

    count: int = 0
    prefetched: int = 0  # of those, loaded beside computation
    seconds: float = 0.0
    nbytes: int = 0


@dataclass
class Slots:
    """S slots for V variants, least recently used out.

    Args:
        num_slots: S, the variants that one step may mix.
        staging: 1 for a staging row, 0 to load only when a variant is needed.
        row_map: shared by all slot-managed stacks; -1 while a variant is in no row.
        read: (variant, tensor name) -> its tensor, from the host tier.
        stacks: name -> rows `[S + staging, *shape]`.
    """

    num_slots: int
    staging: int
    row_map: RowMap
    read: Callable[[int, str], torch.Tensor]
    stacks: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: ReconfigurationStats = field(default_factory=ReconfigurationStats)

    def __post_init__(self) -> None:
        self._variant_of_row: list[int] = [-1] * self.num_rows
        self._last_used: list[int] = [0] * self.num_rows
        self._clock = 0
        self._current: set[int] = set()  # variants of the last batch: their rows are not touched beside it
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polymoe-slots")
        self._arriving: tuple[int, int, Future[int]] | None = None  # (variant, row, its bytes)

    @property
    def num_rows(self) -> int:
        return self.num_slots + self.staging

    @property
    def loaded(self) -> frozenset[int]:
        """Variants that are in a row now."""
        return frozenset(v for v in self._variant_of_row if v >= 0)

    def fill(self) -> None:
        """Load the first variants, at start-up (not counted as reconfigurations)."""
        for variant in range(self.num_rows):
            self._copy(variant, self._vacate(variant))
            self._install(variant, variant)

    def ensure(self, variants: set[int]) -> None:
        """Bring every one of `variants` into a row; those that are not asked for make room, oldest use first."""
        assert len(variants) <= self.num_slots, f"{len(variants)} variants for {self.num_slots} slots"
        self._clock += 1
        missing = sorted(variants - self.loaded)
        if missing:
            started = time.perf_counter()
            self._receive(variants)
            for variant in sorted(variants - self.loaded):
                row = self._oldest_row_without(variants)
                self.stats.nbytes += self._copy(variant, self._vacate(row))
                self._install(variant, row)
            self.stats.count += len(missing)
            self.stats.seconds += time.perf_counter() - started
        for row, variant in enumerate(self._variant_of_row):
            if variant in variants:
                self._last_used[row] = self._clock
        self._current = set(variants)

    def prefetch(self, variant: int) -> None:
        """Start copying `variant` into a row that the current batch does not use, if it is not there already."""
        if not self.staging or variant in self.loaded or self._arriving is not None:
            return
        row = self._oldest_row_without(self._current)
        self._arriving = (variant, row, self._worker.submit(self._copy, variant, self._vacate(row)))

    def _receive(self, wanted: set[int]) -> None:
        """Wait for the variant that is on its way (its row may be needed even if it is not wanted) and install it."""
        if self._arriving is None:
            return
        variant, row, future = self._arriving
        self._arriving = None
        self.stats.nbytes += future.result()
        self._install(variant, row)
        self.stats.prefetched += variant in wanted

    def _oldest_row_without(self, variants: set[int]) -> int:
        busy = -1 if self._arriving is None else self._arriving[1]
        free = [r for r in range(self.num_rows) if self._variant_of_row[r] not in variants and r != busy]
        return min(free, key=lambda r: self._last_used[r])

    def _vacate(self, row: int) -> int:
        """Nobody is in `row` from now on, so that a failed read leaves an empty row and never a mixed one."""
        previous = self._variant_of_row[row]
        if previous >= 0:
            self.row_map.assign(previous, -1)
        self._variant_of_row[row] = -1
        return row

    def _copy(self, variant: int, row: int) -> int:
        """Copy all of a variant's own tensors into `row`; bytes moved. May run beside a forward pass."""
        moved = 0
        for name, rows in self.stacks.items():
            source = self.read(variant, name)
            copy_padded(rows[row], source)
            moved += source.numel() * source.element_size()
        return moved

    def _install(self, variant: int, row: int) -> None:
        self._variant_of_row[row] = variant
        self._last_used[row] = self._clock
        self.row_map.assign(variant, row)

    def check_integrity(self) -> None:
        """Rows and row map say the same."""
        for variant, row in enumerate(self.row_map.rows):
            held = self._variant_of_row.index(variant) if variant in self._variant_of_row else -1
            assert row == held, f"variant {variant}: row map says {row}, the rows say {held}"


def copy_padded(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `target`, zeros after it where a variant has fewer vocabulary rows (axis 0)."""
    assert source.shape[1:] == target.shape[1:], f"{tuple(source.shape)} does not fit {tuple(target.shape)}"
    assert source.ndim == 0 or source.shape[0] <= target.shape[0], f"{tuple(source.shape)} into {tuple(target.shape)}"
    if source.ndim and source.shape[0] < target.shape[0]:
        target[source.shape[0] :].zero_()
        target = target[: source.shape[0]]
    if source.dtype == target.dtype and target.device.type == "cpu" and source.is_contiguous() and source.ndim:
        # Plain memory, one thread: torch's copy would take threads away from a forward pass that runs beside it.
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)
