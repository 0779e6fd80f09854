"""How often tokens are routed to each expert, while somebody wants to know."""

import time

import torch

from polymoe.model.backends.base import Routed

_EVERY = 4  # of so many steps one is counted
_ASKED_FOR = 10.0  # seconds for which a question is remembered


class RoutingCounts:
    """Counts of (variant, layer, expert), of one step in `_EVERY`, for `_ASKED_FOR` seconds after each `take`.

    Steps that a GPU replays as a captured graph pass by it: there the counts are those of prompts.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.counting = False  # in the step that runs
        self._shape = shape  # [V, L, E]
        self._device = device
        self._counts: torch.Tensor | None = None  # int64 [V · L · E], from the first question on
        self._steps = 0
        self._until = 0.0  # time.monotonic()

    def count(self, layer: int, routed: Routed) -> None:
        """Add the tokens of one layer; only while `counting`."""
        assert self._counts is not None
        _, num_layers, num_experts = self._shape
        place = (routed.token_variant[:, None] * num_layers + layer) * num_experts + routed.experts
        place = place.reshape(-1)
        self._counts.index_add_(0, place, torch.ones_like(place, dtype=torch.int64))

    def after_step(self) -> None:
        """Decide about the next step."""
        self._steps += 1
        self.counting = self._steps % _EVERY == 0 and time.monotonic() < self._until

    def take(self) -> bytes:
        """What was counted since the last call, as little-endian uint32 [V, L, E]; counting goes on for a while."""
        self._until = time.monotonic() + _ASKED_FOR
        if self._counts is None:
            self._counts = torch.zeros(self._shape.numel(), dtype=torch.int64, device=self._device)
        found = self._counts.cpu().numpy().astype("<u4").tobytes()
        self._counts.zero_()
        return found
