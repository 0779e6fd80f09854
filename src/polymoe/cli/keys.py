"""`polymoe keys`: who may use a server, and how much."""

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from polymoe.console import Console

app = typer.Typer(name="keys", no_args_is_help=True, help="API keys of a server: add, list, revoke.")
console = Console()

File = Annotated[
    Path, typer.Option(envvar="POLYMOE_KEYS", help="the file that `polymoe serve --keys` reads, again when it changes")
]
Name = Annotated[str, typer.Argument(help="of the key: letters, digits, '.', '_' and '-'")]


@app.command()
def add(
    name: Name,
    file: File,
    variant: Annotated[
        list[str] | None, typer.Option(help="may be used with this key; may be repeated; default all")
    ] = None,
    weight: Annotated[float, typer.Option(help="of its share of a variant's tokens beside other keys")] = 1.0,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="of prompts and answers")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="requests at once")] = None,
) -> None:
    """Make a key and print it. The file holds only its hash: nobody can print it again."""
    from polymoe.server.keys import Key, add_key

    variants = tuple(variant) if variant else None
    key = Key(
        name=name, sha256="0" * 64, variants=variants, weight=weight, requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute, concurrency=concurrency,
    )  # fmt: skip
    print(add_key(file, key))


@app.command(name="list")
def list_keys(file: File) -> None:
    """Show names and limits."""
    from polymoe.server.keys import read_keys

    table = Table("name", "variants", "weight", "requests/min", "tokens/min", "at once", "made")
    for key in read_keys(file):
        limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrency)
        made = datetime.datetime.fromtimestamp(key.created, datetime.UTC).strftime("%Y-%m-%d")
        variants = "all" if key.variants is None else ", ".join(key.variants)
        table.add_row(key.name, variants, f"{key.weight:g}", *("" if n is None else str(n) for n in limits), made)
    console.print(table)


@app.command()
def revoke(name: Name, file: File) -> None:
    """Remove a key. A running server refuses it within about a second; requests that run finish."""
    from polymoe.server.keys import revoke_key

    revoke_key(file, name)
