"""Progress bars by bytes or by steps, gone when they are done."""

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

from polymoe.console import Console, DescriptionColumn


@contextmanager
def byte_progress(label: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show `label` and yield `advance(num_bytes)`. Without a console nothing is shown."""
    if console is None:
        yield lambda _: None
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
    columns = (DescriptionColumn(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)
