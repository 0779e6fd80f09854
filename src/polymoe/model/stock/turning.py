"""Cosines and sines of a stock rotary embedding, looked up where they depend on a token's position alone."""

from typing import Any

import torch

from polymoe.kernels.cpu.decoder import Turns

_FIRST, _MOST = 1024, 32768  # rows of a table


class Turning:
    """What `module`, a stock model's rotary embedding in bfloat16, gives for positions.

    Its eight operations take as long as a layer's attention where few tokens run. The table grows as sequences do.
    Where angles follow the longest sequence (`rope_type` dynamic or longrope), or the module does not say, nothing is
    looked up.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        kind = getattr(module, "rope_type", None)
        self._by_table = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, positions: torch.Tensor, bound: int) -> Turns:
        """For `positions [T]` below `bound`."""
        if not self._by_table or bound > _MOST:
            return Turns(*self._computed(positions), torch.arange(len(positions)))
        if self._table is None or len(self._table[0]) < bound:
            rows = _FIRST
            while rows < bound:
                rows *= 2
            self._table = self._computed(torch.arange(rows))
        return Turns(*self._table, positions)

    def _computed(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(1, dtype=torch.bfloat16)
        cos, sin = self._module(like, position_ids=positions[None])
        return cos[0].contiguous(), sin[0].contiguous()
