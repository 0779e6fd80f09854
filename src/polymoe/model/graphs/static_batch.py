"""Inputs of a decode step at fixed addresses, so that a captured graph can read every step's from the same place.

All inputs are cut from one int64 buffer, anew for each batch size B, with M blocks a sequence at most:

    |-- input_ids B --|-- positions B --|-- token_variant B --|-- slot_mapping B --|-- block_table B x M --| unused |

so that one copy from pinned memory brings a whole step. A step of n < B sequences is padded with its own last row:
what the padding computes equals what that row computes (no other expert is read, no other variant's weight), only its
keys and values go to a block that no sequence owns.
"""

from dataclasses import dataclass

import numpy as np
import torch

from polymoe.model.batch.batch import AttentionBatch, DeviceLengths, ForwardBatch, Segments
from polymoe.model.transfer.upload import upload

_COLUMNS = 4  # numbers a sequence beside its row of the block table


@dataclass(frozen=True)
class PendingInputs:
    """Input tokens of a step that only the device knows: those that the step before has drawn."""

    index: np.ndarray  # [n] int64, where they stand in the step's tokens, ascending
    tokens: torch.Tensor  # [n] int64, on the device

    def put_into(self, input_ids: torch.Tensor) -> None:
        input_ids.index_copy_(0, upload(self.index, input_ids.device), self.tokens)


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step of n sequences, on the host. int64; the rows are sorted by variant."""

    input_ids: np.ndarray  # [n]; anything where the token is a pending one
    positions: np.ndarray  # [n]
    token_variant: np.ndarray  # [n]
    slot_mapping: np.ndarray  # [n]
    block_table: np.ndarray  # [n, blocks], at most M
    pending: PendingInputs | None = None


class StaticBatch:
    """The buffer, on the host and on the device.

    Args:
        capacity: largest B.
        max_blocks: M.
        null_slot: where padding rows write their keys and values.
    """

    def __init__(self, capacity: int, max_blocks: int, null_slot: int, device: torch.device) -> None:
        self.capacity, self.max_blocks, self.null_slot, self.device = capacity, max_blocks, null_slot, device
        size = capacity * (_COLUMNS + max_blocks)
        # Two, in turn: a step is written while the one before runs, and the one before that is done.
        self._hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._sequence = torch.arange(capacity, device=device)
        self._start_loc = torch.arange(capacity + 1, dtype=torch.int32, device=device)

    def fill(self, inputs: DecodeInputs, size: int) -> None:
        """Write a step, padded to `size` rows, and start its copy to the device."""
        count, width = inputs.block_table.shape
        assert 1 <= count <= size <= self.capacity
        assert width <= self.max_blocks
        self._hosts.reverse()
        *columns, table = self._cut(self._hosts[0], size)
        given = (inputs.input_ids, inputs.positions, inputs.token_variant, inputs.slot_mapping)
        for column, values in zip(columns, given, strict=True):
            column.numpy()[:count] = values
            column.numpy()[count:] = values[-1]
        columns[-1].numpy()[count:] = self.null_slot
        table.numpy()[:count, :width] = inputs.block_table
        table.numpy()[count:, :width] = inputs.block_table[-1]
        used = size * (_COLUMNS + self.max_blocks)
        self._device[:used].copy_(self._hosts[0][:used], non_blocking=True)
        if inputs.pending is not None:
            self._put(inputs.pending, count, size)

    def _put(self, pending: PendingInputs, count: int, size: int) -> None:
        """Pending tokens to their rows, and to the padding if it repeats one of them."""
        input_ids = self._cut(self._device, size)[0]
        pending.put_into(input_ids)
        if pending.index[-1] == count - 1:
            input_ids[count:] = pending.tokens[-1]

    def tensors(self, size: int) -> tuple[torch.Tensor, torch.Tensor, ForwardBatch]:
        """Device tensors of a step of `size` rows: `input_ids [size]`, `positions [size]`, and the batch.

        The batch is a new one each time: what it remembers is remembered for one pass.
        """
        input_ids, positions, token_variant, slot_mapping, table = self._cut(self._device, size)
        segments = Segments(token_variant, ())
        attention = AttentionBatch(
            query_start_loc=list(range(size + 1)),
            seq_lens=[],  # only the device knows
            block_table=table,
            slot_mapping=slot_mapping,
            token_sequence=self._sequence[:size],
            token_visible=positions + 1,
            device_lengths=DeviceLengths(self._start_loc[: size + 1], (positions + 1).int(), max_query_len=1),
        )
        return input_ids, positions, ForwardBatch(tokens=segments, sampled=segments, attention=attention)

    def _cut(self, buffer: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        columns = buffer[: _COLUMNS * size].view(_COLUMNS, size)
        table = buffer[_COLUMNS * size : (_COLUMNS + self.max_blocks) * size].view(size, self.max_blocks)
        return (*columns, table)
