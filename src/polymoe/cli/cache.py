"""`polymoe cache …`: what was planned on the fly and made for benchmarks, and how to get rid of it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from polymoe.cache_folder import VARIABLE, cache_root
from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import PolymoeError, explain

if TYPE_CHECKING:
    from polymoe.offline.cache_items import CacheItem

app = typer.Typer(
    name="cache", help="Bundles that `serve NAME=PATH…`, `demo` and `LLM` planned and kept: list or remove them.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip
console = Console()
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", envvar=VARIABLE, help="where bundles planned on the fly are kept; default ~/.cache/polymoe"
    ),
]


@app.command(name="list")
def show(cache: CacheFolder = None) -> None:
    """Show what the cache holds, the least recently used first."""
    from polymoe.offline.cache_items import cache_items

    root = cache_root() if cache is None else cache
    items = cache_items(root)
    table = Table("what", "bytes", "last used", "folder", title=f"{root}: {format_bytes(_total(items))}",
                  title_justify="left")  # fmt: skip
    for item in items:
        note = "" if item.useless is None else f" ({item.useless}: never used again)"
        table.add_row(f"{item.kind} {item.what}{note}", format_bytes(item.num_bytes), _ago(item.used), item.path.name)
    console.print(table)


@app.command()
def prune(
    days: Annotated[float, typer.Option("--unused-for", min=0, metavar="DAYS", help="keep what was used since")] = 30.0,
    everything: Annotated[bool, typer.Option("--all", help="whatever its age")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    cache: CacheFolder = None,
) -> None:
    """Remove bundles that were not used for some time or that this version cannot use; they are planned again when
    they are needed. Nothing is touched but what polymoe made itself."""
    from polymoe.offline.cache_items import cache_items, remove, to_prune

    chosen = to_prune(cache_items(cache_root() if cache is None else cache), days, everything)
    for item in chosen:
        if not dry_run:
            try:
                remove(item)
            except OSError as error:
                raise PolymoeError(f"{item.path} cannot be removed: {explain(error)}") from error
        verb = "would remove" if dry_run else "removed"
        console.print(f"{verb} {item.path} ({format_bytes(item.num_bytes)}, used {_ago(item.used)})", soft_wrap=True)
    console.print(
        f"{format_bytes(_total(chosen))} in {len(chosen)} folders {'would be' if dry_run else 'were'} removed."
    )


def _total(items: "list[CacheItem]") -> int:
    return sum(item.num_bytes for item in items)


def _ago(moment: float) -> str:
    days = (time.time() - moment) / 86400
    return "today" if days < 1 else f"{days:.0f} days ago"
