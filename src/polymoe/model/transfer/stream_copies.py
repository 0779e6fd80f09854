"""Copies to a GPU on a stream of their own, from pinned memory, with an event for each group.

The host never waits: the computing stream waits for a group's event before it reads the group's tensors, so that the
first layers run while later ones still arrive.
"""

from collections.abc import Sequence

import torch

from polymoe.model.transfer.copies import Copy, by_group, copy_padded


class StreamArrival:
    """An event for each group, recorded behind its copies."""

    def __init__(self, started: torch.cuda.Event, groups: dict[str, torch.cuda.Event]) -> None:
        self._started, self._groups = started, groups
        self._last = list(groups.values())[-1] if groups else started

    def wait(self, group: str) -> None:
        if group in self._groups:
            torch.cuda.current_stream().wait_event(self._groups[group])

    def wait_all(self) -> None:
        torch.cuda.current_stream().wait_event(self._last)  # one stream: the last is behind all others

    def seconds(self) -> float | None:
        done = self._last.query()  # type: ignore[no-untyped-call]
        return self._started.elapsed_time(self._last) / 1000 if done else None


class StreamCopier:
    """See the module docstring. What was copied once stays in pinned memory, as the device needs it, for the next time.

    That is one set of non-experts a variant in the host's memory (Mixtral-8x7B: 3.2 GB).
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: dict[tuple[int, str], torch.Tensor] = {}

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def prepare(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._host(copy)

    def start(self, copies: Sequence[Copy], after: torch.cuda.Event) -> StreamArrival:
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        events: dict[str, torch.cuda.Event] = {}
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            started.record()
            for group, own in by_group(copies).items():
                for copy in own:
                    copy.target.copy_(self._host(copy), non_blocking=True)
                events[group] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                events[group].record()
        return StreamArrival(started, events)

    def _host(self, copy: Copy) -> torch.Tensor:
        """The source in pinned memory, in the target's dtype and shape."""
        if copy.key not in self._pinned:
            source = copy.read()
            if not (source.is_pinned() and source.dtype == copy.target.dtype and source.shape == copy.target.shape):
                pinned = torch.empty(copy.target.shape, dtype=copy.target.dtype, pin_memory=True)
                copy_padded(pinned, source)
                source = pinned
            self._pinned[copy.key] = source
        return self._pinned[copy.key]
