"""The one door to the terminal: everything that is printed goes through here, and none of it is read as markup.

Prompts, answers, paths, names and messages of other libraries hold brackets (`[INST]`), `:smile:` and, if they are
hostile, control sequences. They are text; only what this module styles itself is styled.
"""

import re
from typing import Any

import rich.console
from rich.progress import ProgressColumn, Task
from rich.status import Status
from rich.text import Text

# Control characters but tab and line feed, and lone surrogates (bytes of an argument that are no UTF-8).
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` with what would steer a terminal, or cannot be encoded, written as an escape: `\\x1b`, `\\udcff`."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text).replace("\r\n", "\n"))


class Console(rich.console.Console):
    """A `rich` console that prints strings as they are, wherever they stand: in a line, a cell, a title, a status."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that `rich` renders passes here."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})

    def status(self, status: rich.console.RenderableType, **options: Any) -> Status:
        return super().status(Text(printable(status)) if isinstance(status, str) else status, **options)


class DescriptionColumn(ProgressColumn):
    """What a progress bar is about."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description))


def warn(console: rich.console.Console, message: object) -> None:
    """A line that begins with a yellow "warning:"; it is not wrapped, so that it can be searched for."""
    console.print(Text.assemble(("warning:", "bold yellow"), " ", printable(message)), soft_wrap=True)


def print_error(console: rich.console.Console, message: object) -> None:
    """A line that begins with a red "error:"; not wrapped either."""
    console.print(Text.assemble(("error:", "bold red"), " ", printable(message)), soft_wrap=True)
