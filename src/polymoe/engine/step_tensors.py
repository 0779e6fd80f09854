"""One step as the runner has it, on the host and on the device."""

from dataclasses import dataclass

import numpy as np
import torch

from polymoe.engine.scheduling.step_record import ScheduledSequence, SequenceKey
from polymoe.model.batch.batch import ForwardBatch


@dataclass(frozen=True)
class GatheredStep:
    """One step on the host. B sequences, T tokens; for each sequence in `order`, `num_rows` of its last are sampled."""

    order: tuple[ScheduledSequence, ...]  # sorted by variant
    variants: list[int]  # B
    counts: list[int]  # B, tokens of each
    num_rows: tuple[int, ...]  # B
    input_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64
    block_table: np.ndarray  # [B, most blocks] int64, padded with 0
    seq_lens: list[int]  # B
    pending: np.ndarray  # [n] int64, which of the T tokens the host does not know yet; each the last of its sequence
    pending_sequences: list[SequenceKey]  # n

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token, which is sampled from."""
        return all(count == rows == 1 for count, rows in zip(self.counts, self.num_rows, strict=True))


@dataclass(frozen=True)
class PreparedStep:
    """Device tensors of one step of T tokens, R of which are sampled from."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sampled_rows: torch.Tensor  # [R] int64
    batch: ForwardBatch
