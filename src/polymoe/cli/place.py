"""`polymoe place`: which variants live on which device."""

from pathlib import Path
from typing import Annotated

import typer

from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import ConfigError, explain

console = Console()


def place(
    file: Annotated[Path, typer.Argument(metavar="PLACE.toml", help="families, devices and rates: docs/deploy.md")],
    out: Annotated[Path, typer.Option(help="the deploy configuration to write")],
    present: Annotated[
        Path | None, typer.Option(help="the deploy configuration that runs now: few variants move away from it")
    ] = None,
    why: Annotated[bool, typer.Option("--explain", help="say why each variant is where it is")] = False,
    force: Annotated[bool, typer.Option(help="replace an existing file")] = False,
) -> None:
    """Decide which variants share a device, in how many replicas and with which budget; write the deploy file."""
    from polymoe.deploy.config import read_deploy_config
    from polymoe.place import place as placement
    from polymoe.place.read import present_placement, read_problem
    from polymoe.place.write import deploy_toml
    from polymoe.place.write import explain as reasons

    if out.exists() and not force:
        raise ConfigError(f"{out} exists; give another name, or --force to replace it.")
    problem = read_problem(file)
    before = None if present is None else present_placement(read_deploy_config(present))
    placed = placement.place(problem, before)
    try:
        out.write_text(deploy_toml(problem, placed), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {explain(error)}") from error
    if why:
        for line in reasons(problem, placed):
            console.print(line, soft_wrap=True, highlight=False)
    console.print(
        f"{out}: {len(problem.rates)} variants on {len(placed.pools)} of {len(problem.devices)} devices, "
        f"{format_bytes(placed.num_bytes)}.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if before is not None:
        moved = placed.moved(before)
        console.print(f"{len(moved)} variants move{': ' + ', '.join(moved[:20]) if moved else ''}.", soft_wrap=True)
