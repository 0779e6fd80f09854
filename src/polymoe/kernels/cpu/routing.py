"""Rows, one a (token, expert) pair, sorted by base and then by variant: see `compressed_experts.py`."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Sorted rows and their segments.

    order: `[S]` int64, row i is the (token, k) pair `order[i]`.
    starts: G + 1 offsets of the segments, from 0 to S.
    base, delta, sign: of each segment; base < 0 is a host expert, delta −1 is none.
    """

    order: Tensor
    starts: list[int]
    base: list[int]
    delta: list[int]
    sign: list[int]

    @cached_property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """starts, base, delta and sign as int64 on the CPU."""
        starts, base, delta, sign = (torch.tensor(v) for v in (self.starts, self.base, self.delta, self.sign))
        return starts, base, delta, sign

    def from_segment(self, first: int) -> "Routing":
        """Without the segments before `first`, and rows counted from its start."""
        start = self.starts[first]
        starts = [offset - start for offset in self.starts[first:]]
        return Routing(self.order[start:], starts, self.base[first:], self.delta[first:], self.sign[first:])


def route(physical: Tensor, token_variant: Tensor, delta: Tensor | None, sign: Tensor | None) -> Routing:
    """Sort `physical` `[T, K]` (base ids) by base, then by `token_variant` `[T]`.

    delta, sign: `[T, K]`, or None where there are none.
    """
    base = physical.reshape(-1).cpu().numpy()
    variant = token_variant[:, None].expand_as(physical).reshape(-1).cpu().numpy()
    order = np.lexsort((variant, base))
    base, variant = base[order], variant[order]
    starts = np.flatnonzero((np.diff(base, prepend=base[0] - 1) != 0) | (np.diff(variant, prepend=-1) != 0))

    def of_segments(values: Tensor | None, default: int) -> list[int]:
        if values is None:
            return [default] * len(starts)
        found: list[int] = values.reshape(-1).cpu().numpy()[order][starts].tolist()
        return found

    return Routing(
        torch.from_numpy(order).to(physical.device),
        [*starts.tolist(), len(base)],
        base[starts].tolist(),
        of_segments(delta, -1),
        of_segments(sign, 1),
    )
