"""What the programs that measure a family have in common on their command lines."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from polymoe.console import Console
from polymoe.demo import family_paths

console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for the tables

Specs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=PATH…]", help="checkpoints; default: the family that comes with the package"),
]
Out = Annotated[Path, typer.Option(help="folder for the JSON, Markdown and PNG files")]


def checkpoints_of(specs: list[str] | None) -> dict[str, Path]:
    """Variant -> folder. Raises `PolymoeError` for a spec that is no good."""
    from polymoe.offline.family import parse_variant_specs
    from polymoe.offline.source import resolve

    return {name: resolve(spec) for name, spec in parse_variant_specs(specs).items()} if specs else family_paths()


def program() -> typer.Typer:
    """For one command; `polymoe.cli.main` runs it."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)
