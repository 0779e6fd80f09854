"""Bringing many tensors to the device beside computation, in groups, so that what is needed first can be used first.

`ThreadCopier` is for memory that the CPU computes in, `StreamCopier` (`stream_copies.py`) for a GPU. Both return an
`Arrival`: whoever reads a group's tensors waits for that group alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Copy:
    """`read()` goes to `target`. `key` names the source for whoever keeps it; `group`: what is waited for together."""

    group: str
    target: torch.Tensor
    key: tuple[int, str]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.target.element_size()


class Arrival(Protocol):
    """Copies on their way."""

    def wait(self, group: str) -> None:
        """What computes after this sees the group's tensors; raises what reading them raised."""

    def wait_all(self) -> None:
        """The same for all groups."""

    def seconds(self) -> float | None:
        """How long the device was busy with them; None while that is not known."""


class Copier(Protocol):
    """Starts copies."""

    def mark(self) -> Any:
        """Now, in the order of what was given to the device."""

    def prepare(self, copies: Sequence[Copy]) -> None:
        """Make their sources ready, so that a later start does not read files."""

    def start(self, copies: Sequence[Copy], after: Any) -> Arrival:
        """Begin, once all that was given to the device before the mark `after` is done with the targets."""


class ThreadArrival:
    """Futures, in order of the groups."""

    def __init__(self, groups: dict[str, Future[None]]) -> None:
        self._groups = groups

    def wait(self, group: str) -> None:
        if group in self._groups:
            self._groups[group].result()

    def wait_all(self) -> None:
        for future in self._groups.values():
            future.result()

    def seconds(self) -> float | None:
        """Whoever waited has counted it."""
        return 0.0


class ThreadCopier:
    """One thread of its own; nothing is in flight on a CPU, so that a mark means nothing."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polymoe-slots")

    def mark(self) -> None:
        return None

    def prepare(self, copies: Sequence[Copy]) -> None:
        """Memory-mapped files are ready."""

    def start(self, copies: Sequence[Copy], after: Any) -> ThreadArrival:  # noqa: ARG002
        return ThreadArrival({name: self._worker.submit(_copy_all, own) for name, own in by_group(copies).items()})


def by_group(copies: Sequence[Copy]) -> dict[str, list[Copy]]:
    """In order of each group's first copy."""
    groups: dict[str, list[Copy]] = {}
    for copy in copies:
        groups.setdefault(copy.group, []).append(copy)
    return groups


def _copy_all(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy_padded(copy.target, copy.read())


def copy_padded(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `target`, zeros after it where a variant has fewer vocabulary rows (axis 0)."""
    assert source.shape[1:] == target.shape[1:], f"{tuple(source.shape)} does not fit {tuple(target.shape)}"
    assert source.ndim == 0 or source.shape[0] <= target.shape[0], f"{tuple(source.shape)} into {tuple(target.shape)}"
    if source.ndim and source.shape[0] < target.shape[0]:
        target[source.shape[0] :].zero_()
        target = target[: source.shape[0]]
    on_cpu = target.device.type == source.device.type == "cpu"
    if source.dtype == target.dtype and on_cpu and source.is_contiguous() and source.ndim:
        # Plain memory, one thread: torch's copy would take threads away from a forward pass that runs beside it.
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)
