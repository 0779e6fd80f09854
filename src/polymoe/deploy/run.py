"""`polymoe deploy`: from the file to running replicas, until the command is stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from polymoe.console import Console
from polymoe.deploy.build import build_app
from polymoe.deploy.check import check_bundles, check_resources
from polymoe.deploy.config import DeployConfig
from polymoe.deploy.installed import require_ray
from polymoe.errors import PolymoeError
from polymoe.server.serve import check_address

APPLICATION = "polymoe"


def check(config: DeployConfig) -> None:
    """Raises `ConfigError` for what can be known to be wrong without Ray."""
    check_bundles(config, {pool.name: pool.sources[0] for pool in config.pools if pool.is_bundle})


def run_deployment(config: DeployConfig, console: Console) -> int:
    """Deploy on the cluster that RAY_ADDRESS names and leave it there, or on a Ray of this machine until SIGTERM.

    Deploying on a cluster again is a rolling update: replicas whose bundle or options changed are replaced one after
    the other, each once it has finished its requests. Returns the exit code.
    """
    require_ray()
    check(config)
    import ray
    from ray import serve

    bundles = _planned(config, console)
    check_bundles(config, bundles)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        check_address(config.server)
    ray.init(address=address, namespace=APPLICATION, log_to_driver=False, **({} if address else _local()))
    if not address:
        _stop_on_signals()  # Ray has set its own, which end the process at once
    try:
        check_resources(config, ray.cluster_resources())
        start_serve(config)
        with console.status("Starting the replicas…"):
            try:
                prefix = "/" if config.http == "proxy" else None
                serve.run(build_app(config, bundles), name=APPLICATION, route_prefix=prefix)
            except RuntimeError as error:
                raise PolymoeError(f"the replicas did not start: {why_not(APPLICATION) or error}") from error
        scheme = "http" if config.server.ssl_certfile is None else "https"
        console.print(
            f"{scheme}://{config.server.host}:{config.server.port} serves {len(config.pools)} pools with "
            f"{sum(pool.replicas for pool in config.pools)} replicas.",
            soft_wrap=True,
        )
        if address:
            console.print("It stays on the cluster; `serve status` shows it, `serve shutdown` ends it.")
        else:
            while True:
                time.sleep(3600)
    except _Stopped:
        serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def start_serve(config: DeployConfig) -> None:
    """Ray Serve, with proxies on all nodes or with none."""
    from ray import serve

    if config.http == "proxy":
        http: dict[str, Any] = {
            "host": config.server.host,
            "port": config.server.port,
            "keep_alive_timeout_s": config.server.keep_alive,
        }
        serve.start(http_options=http)
    else:
        serve.start(proxy_location="Disabled")


def _local() -> dict[str, Any]:
    """A Ray of our own; its web page, which anybody on the machine could use, is not needed."""
    return {"include_dashboard": False}


def _planned(config: DeployConfig, console: Console) -> dict[str, str]:
    """Pool -> its bundle. Checkpoints are planned here, once, into the cache: a folder that all nodes see."""
    from polymoe.offline.cache import planned_bundle

    bundles = {}
    for pool in config.pools:
        if pool.is_bundle:
            bundles[pool.name] = str(Path(pool.sources[0]).expanduser().absolute())
        else:
            engine = pool.engine_config("")
            folder = planned_bundle(
                pool.sources, pool.policy, pool.memory, device=engine.device, reserved=engine.cache_bytes,
                console=console,
            )  # fmt: skip
            bundles[pool.name] = str(folder.absolute())
    return bundles


def why_not(application: str) -> str:
    """What the replicas of an application that was not deployed say themselves; Ray's error often has only names."""
    from ray import serve

    deployments = serve.status().applications[application].deployments
    return " ".join(f"{name}: {found.message}" for name, found in deployments.items() if found.message)


class _Stopped(BaseException):
    """A signal asked for the end, while replicas started or after that."""


def _stop_on_signals() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(*_: object) -> None:
        for number in numbers:  # the end is under way, and orderly
            signal.signal(number, signal.SIG_IGN)
        raise _Stopped

    for number in numbers:
        signal.signal(number, stop)
