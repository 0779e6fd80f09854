"""How an absent expert crosses from the host to the device, beside computation.

On a GPU a thread of its own fills pinned buffers and queues their copies on a side stream; the computing stream waits
for an event. On a CPU an expert is copied (and converted) in plain memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.model.transfer.copies import copy_padded
from polymoe.model.transfer.staging import Staging


@dataclass(frozen=True)
class SentExpert:
    """Tensors by name; `arrived`: the event behind the copies, None where they are there."""

    weights: dict[str, torch.Tensor]
    arrived: Any = None


class ExpertLink:
    """`send` belongs to one thread at a time, `receive` to the thread that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging = Staging(device)

    def send(self, expert: Mapping[str, torch.Tensor], dtype: torch.dtype) -> SentExpert:
        """Start an expert's way to the device."""
        if self._stream is None:
            weights = {name: torch.empty(t.shape, dtype=dtype, device=self.device) for name, t in expert.items()}
            for name, source in expert.items():
                copy_padded(weights[name], source)
            return SentExpert(weights)
        with torch.cuda.stream(self._stream):
            weights = {name: torch.empty(t.shape, dtype=dtype, device=self.device) for name, t in expert.items()}
            for name, source in expert.items():
                if source.is_pinned() and source.dtype == dtype:
                    weights[name].copy_(source, non_blocking=True)
                else:
                    self._staging.copy(weights[name], source)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return SentExpert(weights, arrived)

    def receive(self, sent: SentExpert) -> dict[str, torch.Tensor]:
        """The expert's tensors, for what this thread computes from now on."""
        if sent.arrived is not None:
            current = torch.cuda.current_stream()
            current.wait_event(sent.arrived)
            for tensor in sent.weights.values():
                tensor.record_stream(current)  # its memory is not given away while it is read
        return sent.weights
