"""Where a thread that loads weights beside the steps gives its copies to the device.

    steps     |-- step --|-- step --|- mark -|-- step --|-- step --|-- join --|-- step: sees what was copied --|
    copies                                   |------ after the mark ------|

On a GPU they run on a stream of their own, so that no step waits for them: after all that was given to the device
before `mark`, since what they overwrite may still be read until then, and before what is given to it after `join`. A
captured graph is launched on the steps' stream, so the same holds for its replays. On a CPU nothing is in flight
between two steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BesideSteps:
    """`mark` and `join` belong between two steps, on their thread; `copying` to the thread that loads."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._mark: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None

    def mark(self) -> None:
        """What is copied from now on may overwrite what steps until now have read."""
        if self._stream is not None:
            self._mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._mark.record()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies and allocations in here are on the stream of their own."""
        if self._stream is None:
            yield
            return
        assert self._mark is not None, "copies have to come after a mark"
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._mark)
            yield
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def join(self) -> None:
        """Steps from now on see what was copied. Nobody waits but the device."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = None
