"""`polymoe deploy`: pools of engines on Ray Serve, behind one server."""

from pathlib import Path
from typing import Annotated

import typer

from polymoe.console import Console

console = Console()


def deploy(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="pools and server options: docs/deploy.md")],
    check_config: Annotated[
        bool, typer.Option("--check-config", help="check the file and the bundles that it names, and exit")
    ] = False,
) -> None:
    """Serve bundles with several replicas on Ray Serve, through the same OpenAI API as `polymoe serve`."""
    from polymoe.deploy.config import read_deploy_config
    from polymoe.deploy.run import check, run_deployment

    read = read_deploy_config(config)
    if check_config:
        check(read)
        console.print(f"{config}: {len(read.pools)} pools, {sum(pool.replicas for pool in read.pools)} replicas.")
    else:
        raise typer.Exit(run_deployment(read, console))
