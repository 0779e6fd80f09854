"""Progress bars by bytes or by steps, gone when they are done; without a terminal, a line for what took long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from polymoe.config import format_bytes
from polymoe.console import Console, DescriptionColumn

_WORTH_A_LINE = 2.0  # seconds


@contextmanager
def byte_progress(label: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show `label` and yield `advance(num_bytes)`. Without a console nothing is shown."""
    if console is None:
        yield lambda _: None
        return
    if not console.is_terminal:
        started = time.monotonic()
        yield lambda _: None
        seconds = time.monotonic() - started
        say_stage(console, f"{label}: {format_bytes(total)}, {format_bytes(total / max(seconds, 1e-3))}/s", seconds)
        return
    columns = (DescriptionColumn(), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


@contextmanager
def step_progress(label: str, total: int, console: Console | None) -> Iterator[Callable[[], None]]:
    """Show `label`, steps done and the time left, and yield `advance()`. Without a console nothing is shown."""
    if console is None:
        yield lambda: None
        return
    if not console.is_terminal:
        started = time.monotonic()
        yield lambda: None
        say_stage(console, f"{label}: {total} of {total}", time.monotonic() - started)
        return
    columns = (DescriptionColumn(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def say_stage(console: Console, done: str, seconds: float) -> None:
    """A line of a log for a stage that took a while."""
    if seconds >= _WORTH_A_LINE:
        console.print(f"{done}, after {seconds:.0f} s", soft_wrap=True, highlight=False)
