"""The bar that a long batch shows on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from polymoe.console import Console, DescriptionColumn
from polymoe.protocol.request import RequestOutput

OnOutput = Callable[[RequestOutput], None]


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0.0
        return Text(f"{task.fields['tokens'] / seconds:,.0f} tokens/s" if seconds > 0 else "")


@contextmanager
def batch_progress(total: int, wanted: bool, console: Console | None = None) -> Iterator[OnOutput]:
    """Yield what is to be called with each request that has ended.

    Nothing is shown for a single prompt, and where standard error is neither a terminal nor a notebook.
    """
    console = console or Console(stderr=True)
    if not wanted or total < 2 or not (console.is_terminal or console.is_jupyter):
        yield lambda _: None
        return
    columns = (DescriptionColumn(), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    tokens = 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Generating", total=total, tokens=0)

        def ended(output: RequestOutput) -> None:
            nonlocal tokens
            tokens += sum(len(completion.token_ids) for completion in output.outputs)
            progress.update(task, advance=1, tokens=tokens)

        yield ended
