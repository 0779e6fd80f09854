"""Progress bars by bytes or by steps, gone when they are done; without a terminal, a line for what took long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from polymoe.config import format_bytes
from polymoe.console import Console, DescriptionColumn

_WORTH_A_LINE = 2.0  # seconds
_TELL_EVERY = 0.2  # seconds


class Listener(Console):
    """A console for a program: it prints nothing, and `listen(stage, fraction)` is called a few times a second."""

    def __init__(self, listen: Callable[[str, float], None]) -> None:
        super().__init__(quiet=True)
        self._listen = listen

    def stage(self, label: str, total: int) -> Callable[[int], None]:
        """What is to be called with what was done of `total` since the last call."""
        done, told = 0, 0.0
        self._listen(label, 0.0)

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            if (now := time.monotonic()) - told >= _TELL_EVERY:
                told = now
                self._listen(label, done / max(total, 1))

        return advance


@contextmanager
def byte_progress(label: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show `label` and yield `advance(num_bytes)`. Without a console nothing is shown."""
    if console is None:
        yield lambda _: None
        return
    if isinstance(console, Listener):
        yield console.stage(label, total)
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
    if isinstance(console, Listener):
        listened = console.stage(label, total)
        yield lambda: listened(1)
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


@contextmanager
def stage_progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yield `show(stage, fraction)`: a bar a stage, and where there is no terminal a line for each that took a while. A
    stage ends at 1, when the next one begins, or with the block."""
    if not console.is_terminal:
        begun: dict[str, float] = {}
        open_stage: str | None = None

        def end() -> None:
            nonlocal open_stage
            if open_stage is not None:
                say_stage(console, open_stage, time.monotonic() - begun[open_stage])
            open_stage = None

        def say(stage: str, fraction: float) -> None:
            nonlocal open_stage
            if stage not in begun:
                end()
                begun[stage], open_stage = time.monotonic(), stage
            if fraction >= 1 and stage == open_stage:
                end()

        yield say
        end()
        return
    columns = (DescriptionColumn(), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as progress:

        def show(stage: str, fraction: float) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=fraction)

        yield show


def say_stage(console: Console, done: str, seconds: float) -> None:
    """A line of a log for a stage that took a while."""
    if seconds >= _WORTH_A_LINE:
        console.print(f"{done}, after {seconds:.0f} s", soft_wrap=True, highlight=False)
