"""Results of the device to the host, so that the host can go on until it needs them."""

from collections.abc import Sequence

import torch


class Download:
    """Starts to copy `tensors` to the host; from a GPU through pinned memory, behind what was given to it so far."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            # Pinned memory that is freed while a copy into it is under way is not given away before that is done.
            self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host. Nothing waits but this."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
