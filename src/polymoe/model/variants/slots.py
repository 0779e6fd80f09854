"""Run-time partial reconfiguration: fewer slots than variants, and a variant's non-experts loaded when it is needed.

A slot is one row in every slot-managed stack. Loading copies the variant's own tensors into the row; tensors that all
variants share, or that have no more versions than there are slots, never move. One row more than there are slots is the
staging row: the variant that runs next is copied there while the current batch computes, and the switch itself is then
an entry in the row map.

Pipelined (on a GPU), a step does not wait for a whole variant: each part of the model waits for its own tensors
(`Slots.wait`), so that the first layers run while later ones arrive.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from polymoe.model.batch.batch import RowMap
from polymoe.model.transfer.copies import Arrival, Copier, Copy, ThreadCopier


@dataclass
class ReconfigurationStats:
    """Variants brought in after the first fill. `seconds` is what the engine waited for them (on a GPU: how long the
    copies took), `nbytes` what moved."""

    count: int = 0
    prefetched: int = 0  # of those, loaded beside computation
    seconds: float = 0.0
    nbytes: int = 0


def slot_rows(slots: int, num_variants: int, staging: bool) -> tuple[int, int]:
    """(slots that are of use, 1 or 0 staging rows). With a slot for everyone nothing is ever staged."""
    slots = min(slots, num_variants)
    return slots, int(staging and slots < num_variants)


@dataclass
class Slots:
    """S slots for V variants, least recently used out.

    Args:
        num_slots: S, the variants that one step may mix.
        staging: 1 for a staging row, 0 to load only when a variant is needed.
        row_map: shared by all slot-managed stacks; -1 while a variant is in no row.
        read: (variant, tensor name) -> its tensor, from the host tier.
        stacks: name -> rows `[S + staging, *shape]`, in the order in which a pass reads them.
        copier: how tensors move.
        groups: name of a stack -> what its readers wait for; None: a step begins when its variants are there.
    """

    num_slots: int
    staging: int
    row_map: RowMap
    read: Callable[[int, str], torch.Tensor]
    stacks: dict[str, torch.Tensor] = field(default_factory=dict)
    copier: Copier = field(default_factory=ThreadCopier)
    groups: dict[str, str] | None = None
    stats: ReconfigurationStats = field(default_factory=ReconfigurationStats)

    def __post_init__(self) -> None:
        self._variant_of_row: list[int] = [-1] * self.num_rows
        self._last_used: list[int] = [0] * self.num_rows
        self._clock = 0
        self._current: set[int] = set()  # variants of the last batch: their rows are not touched beside it
        self._arriving: tuple[int, int, Arrival] | None = None  # (variant, row, …)
        self._pending: list[tuple[int, int, Arrival]] = []  # installed, while their tensors may still be on their way
        self._unmeasured: list[Arrival] = []
        self._mark = self.copier.mark()  # before the current batch: what was given to the device until then may run on

    @property
    def num_rows(self) -> int:
        return self.num_slots + self.staging

    @property
    def loaded(self) -> frozenset[int]:
        """Variants that are in a row now."""
        return frozenset(v for v in self._variant_of_row if v >= 0)

    def fill(self) -> None:
        """Load the first variants, at start-up (not counted as reconfigurations), and make the others ready to come."""
        self._mark = self.copier.mark()  # the rows' memory may have been somebody else's until now
        for variant in range(self.num_rows):
            self._install(variant, variant, self._start(variant, variant))
        self.wait_all()
        for variant in range(self.num_rows, len(self.row_map.rows)):
            self.copier.prepare(self._copies(variant, 0))
        self._unmeasured.clear()
        self.stats = ReconfigurationStats()

    def ensure(self, variants: set[int]) -> None:
        """Bring every one of `variants` into a row; those that are not asked for make room, oldest use first."""
        assert len(variants) <= self.num_slots, f"{len(variants)} variants for {self.num_slots} slots"
        self._clock += 1
        self.wait_all()  # the last batch has read what it waited for
        self._mark = self.copier.mark()
        missing = sorted(variants - self.loaded)
        if missing:
            started = time.perf_counter()
            self._receive(variants)
            for variant in sorted(variants - self.loaded):
                row = self._oldest_row_without(variants)
                self._install(variant, row, self._start(variant, row))
            self.stats.count += len(missing)
            self.stats.seconds += time.perf_counter() - started
        for row, variant in enumerate(self._variant_of_row):
            if variant in variants:
                self._last_used[row] = self._clock
        self._current = set(variants)
        self._measure()

    def prefetch(self, variant: int) -> None:
        """Start copying `variant` into a row that the current batch does not use, if it is not there already."""
        if not self.staging or variant in self.loaded or self._arriving is not None:
            return
        row = self._oldest_row_without(self._current)
        self._arriving = (variant, row, self._start(variant, row))

    def wait(self, group: str) -> None:
        """What reads a group's tensors after this sees the variants of the current batch."""
        self._wait_for(lambda arrival: arrival.wait(group))

    def wait_all(self) -> None:
        """The same for all groups."""
        self._wait_for(lambda arrival: arrival.wait_all())
        self._pending.clear()

    def _wait_for(self, wait: Callable[[Arrival], None]) -> None:
        for pending in self._pending:
            started = time.perf_counter()
            try:
                wait(pending[2])
            except BaseException:  # a row with half a variant must not be used again
                self._pending.remove(pending)
                self._vacate(pending[1])
                raise
            self.stats.seconds += time.perf_counter() - started

    def _receive(self, wanted: set[int]) -> None:
        """Install the variant that is on its way (its row may be needed even if it is not wanted)."""
        if self._arriving is None:
            return
        variant, row, arrival = self._arriving
        self._arriving = None
        self._install(variant, row, arrival)
        self.stats.prefetched += variant in wanted

    def _oldest_row_without(self, variants: set[int]) -> int:
        busy = -1 if self._arriving is None else self._arriving[1]
        free = [r for r in range(self.num_rows) if self._variant_of_row[r] not in variants and r != busy]
        return min(free, key=lambda r: self._last_used[r])

    def _vacate(self, row: int) -> None:
        """Nobody is in `row` from now on, so that a failed read leaves an empty row and never a mixed one."""
        previous = self._variant_of_row[row]
        if previous >= 0:
            self.row_map.assign(previous, -1)
        self._variant_of_row[row] = -1

    def _start(self, variant: int, row: int) -> Arrival:
        """Copy all of a variant's own tensors into `row`, beside what the device does."""
        self._vacate(row)
        copies = self._copies(variant, row)
        arrival = self.copier.start(copies, self._mark)
        self.stats.nbytes += sum(copy.nbytes for copy in copies)
        self._unmeasured.append(arrival)
        return arrival

    def _copies(self, variant: int, row: int) -> list[Copy]:
        groups = self.groups or {}
        return [
            Copy(groups.get(name, ""), rows[row], (variant, name), partial(self.read, variant, name))
            for name, rows in self.stacks.items()
        ]

    def _install(self, variant: int, row: int, arrival: Arrival) -> None:
        if self.groups is None:
            arrival.wait_all()
        else:
            self._pending.append((variant, row, arrival))
        self._variant_of_row[row] = variant
        self._last_used[row] = self._clock
        self.row_map.assign(variant, row)

    def _measure(self) -> None:
        """Add the time of copies that are done."""
        for arrival in list(self._unmeasured):
            seconds = arrival.seconds()
            if seconds is not None:
                self.stats.seconds += seconds
                self._unmeasured.remove(arrival)

    def check_integrity(self) -> None:
        """Rows and row map say the same."""
        for variant, row in enumerate(self.row_map.rows):
            held = self._variant_of_row.index(variant) if variant in self._variant_of_row else -1
            assert row == held, f"variant {variant}: row map says {row}, the rows say {held}"
