"""Weights from memory-mapped files to a GPU at the speed of the disk or the bus: two pinned buffers in turn.

While one buffer's bytes cross the bus, the other is filled from the file:

    buffer 0   |-- fill --|-- copy ------|-- fill --|-- copy ------| …
    buffer 1              |-- fill --|-- copy ------|-- fill --| …
"""

import torch

from polymoe.model.transfer.copies import copy_padded

_BUFFER_BYTES = 64 << 20


class Staging:
    """Copies tensors of the host to `device`; on a CPU, and from tensors that need no detour, directly.

    Args:
        nbytes: of each buffer. With `always` the buffers are used on a CPU too (for tests).
    """

    def __init__(self, device: torch.device, nbytes: int = _BUFFER_BYTES, always: bool = False) -> None:
        self._cuda, self._nbytes = device.type == "cuda", nbytes
        self._used = self._cuda or always
        self._buffers: list[torch.Tensor] = []
        self._busy: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source` into `target` of the same shape but for rows that are missing at the end (axis 0), which
        become zero. The host does not wait for the last buffers to arrive; what computes on the device does."""
        direct = source.device.type != "cpu" or (self._cuda and source.is_pinned()) or source.ndim == 0
        if not self._used or direct or not (target.is_contiguous() and source.is_contiguous()):
            if source.shape == target.shape:
                target.copy_(source)  # with all threads, unlike the other
            else:
                copy_padded(target, source)
            return
        if source.shape[0] < target.shape[0]:
            target[source.shape[0] :].zero_()
            target = target[: source.shape[0]]
        assert source.shape == target.shape
        wanted, given = target.view(-1), source.view(-1)
        step = self._nbytes // max(target.element_size(), source.element_size())
        for start in range(0, len(given), step):
            piece = given[start : start + step]
            self._through_buffer(wanted[start : start + step], piece)

    def _through_buffer(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        busy = self._busy[self._turn]
        if busy is not None:
            busy.synchronize()
        nbytes = target.numel() * target.element_size()
        buffer = self._buffers[self._turn][:nbytes].view(target.dtype)
        buffer.copy_(source)  # converts, and reads the file
        target.copy_(buffer, non_blocking=True)
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._busy[self._turn] = event
        self._turn = 1 - self._turn
