"""Rows of the non-experts, given to variants and taken back while the model runs."""

from dataclasses import dataclass, field

import torch

from polymoe.model.batch.batch import RowMap


@dataclass
class RowGroup:
    """Stacks in which variants share rows in the same way, so that one row map serves them all.

    stacks: name -> rows `[R, *shape]`. A row that no variant of the map has is free; `reserved` ones are being filled.
    """

    row_map: RowMap
    stacks: dict[str, torch.Tensor] = field(default_factory=dict)
    reserved: set[int] = field(default_factory=set)

    @property
    def used(self) -> set[int]:
        return {row for row in self.row_map.rows if row >= 0}

    @property
    def num_bytes(self) -> int:
        """Of the rows in use: where memory is given when it is written to, others take none."""
        return len(self.used) * sum(rows[0].numel() * rows.element_size() for rows in self.stacks.values())

    def reserve(self) -> int:
        """A free row; there is one for every version that can be held."""
        taken = self.used | self.reserved
        capacity = next(iter(self.stacks.values())).shape[0]
        row = next(row for row in range(capacity) if row not in taken)
        self.reserved.add(row)
        return row

    def assign(self, variant: int, row: int) -> None:
        """From now on `row` serves `variant`; −1: none does."""
        self.reserved.discard(row)
        self.row_map.assign(variant, row)
