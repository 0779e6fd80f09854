"""The decode step before, moved on by one token, where the same sequences come again, as in most steps.

What is made of a batch (its groups of rows, what kernels are told of it) then stays as it is, and a few numbers change
in place. Only where nobody still reads the step before, and it is described on the host alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from polymoe.engine.scheduling.step_record import PENDING, ScheduledSequence
from polymoe.engine.step_tensors import GatheredStep, PreparedStep


class ContinuedDecode:
    """Args: `block_size`: tokens a block of the KV cache."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._last: tuple[GatheredStep, PreparedStep] | None = None
        self._columns: tuple[memoryview, ...] = ()  # [B]: ids, positions, tokens seen, slots; the tensors' own memory
        self._table = np.empty((0, 0), dtype=np.int64)

    def keep(self, step: GatheredStep, ready: PreparedStep) -> None:
        """What runs now, and perhaps comes again."""
        self._last = None
        attention = ready.batch.attention
        if step.is_decode and not len(step.pending) and attention is not None:
            self._last = step, ready
            tensors = ready.input_ids, ready.positions, attention.token_visible, attention.slot_mapping
            self._columns = tuple(tensor.numpy().data for tensor in tensors)
            self._table = attention.block_table.numpy()

    def moved_on(self, scheduled: Sequence[ScheduledSequence]) -> tuple[GatheredStep, PreparedStep] | None:
        """The step that `scheduled` is; None where it is another one than the last moved on by one token."""
        if self._last is None or len(scheduled) != len(self._last[0].order):
            return None
        step, ready = self._last
        order = tuple(sorted(scheduled, key=lambda item: item.variant))
        width, size = self._table.shape[1], self._block_size
        for item, before in zip(order, step.order, strict=True):
            if item.key is not before.key or item.start != before.start + 1 or not item.samples:
                return None
            if len(item.input_ids) != 1 or item.input_ids[0] == PENDING or len(item.block_ids) > width:
                return None
        ids, positions, visible, slots = self._columns
        for row, (item, before) in enumerate(zip(order, step.order, strict=True)):
            start, blocks = item.start, item.block_ids
            ids[row], positions[row], visible[row] = item.input_ids[0], start, start + 1
            slots[row] = blocks[start // size] * size + start % size
            step.seq_lens[row] = start + 1
            if blocks != before.block_ids:
                self._table[row, : len(blocks)] = blocks
        self._last = replace(step, order=order), ready
        return self._last
