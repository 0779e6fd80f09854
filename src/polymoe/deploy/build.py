"""`build_app`: a deploy configuration as an application of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from polymoe.bundle.live import ADDITIONS
from polymoe.bundle.manifest import read_manifest
from polymoe.deploy.adapter import with_version
from polymoe.deploy.config import INGRESS, LIMITS, DeployConfig, Pool, of_table, read_toml
from polymoe.deploy.ingress import Ingress, behind_proxy
from polymoe.deploy.installed import require_ray
from polymoe.deploy.shared_limits import Ledger
from polymoe.errors import ConfigError

_ROUTING_STATS_PERIOD = 1.0  # seconds between two reports of what is in a replica's slots
_HEALTH_PERIOD = 2.0  # seconds
_WORK_PERIOD = 2.0  # seconds between two reports of what autoscaling goes by
_WORK_MEAN_OF = 10.0  # seconds


def build_app(config: DeployConfig | Mapping[str, str], bundles: Mapping[str, str] | None = None) -> Any:
    """The application: an ingress that runs the server's own app, and one deployment for each pool.

    Args:
        config: or the arguments of `serve run polymoe.deploy:build_app config=deploy.toml`.
        bundles: pool -> folder, where its checkpoints were planned; others have their bundle in `sources`.

    Raises `ConfigError`, also without Ray or with one of another version.
    """
    require_ray()
    from ray import serve

    if not isinstance(config, DeployConfig):
        if set(config) != {"config"}:
            raise ConfigError("build_app takes one argument: config=DEPLOY.toml.")
        path = Path(config["config"])
        config = of_table({**read_toml(path), "http": "proxy"}, str(path))  # Ray's commands start one
    folders = {pool.name: _bundle(pool, bundles or {}) for pool in config.pools}
    pools = [_pool(pool, folders[pool.name], config.server.grace) for pool in config.pools]
    behind = config.http == "proxy"
    versions = [_pool_version(pool, folders[pool.name], config.server.grace) for pool in config.pools]
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,  # the engines refuse with 429
        max_surge_percent=100,  # the port is never without a listener
        graceful_shutdown_timeout_s=config.server.grace,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_PERIOD,
    )(behind_proxy(config, folders) if behind else Ingress)
    shown = [(pool.name, pool.shares, folders[pool.name]) for pool in config.pools]
    with_version(ingress, _digest(config.server, config.http, shown, versions))
    if config.shares_limits:
        ledger = serve.deployment(name=LIMITS, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)(Ledger)
        pools.append(with_version(ledger, _digest()).bind())
    # Pools are arguments only so that they belong to the application.
    return ingress.bind(*pools) if behind else ingress.bind(config, folders, *pools)


def _bundle(pool: Pool, planned: Mapping[str, str]) -> str:
    if pool.name in planned:
        return planned[pool.name]
    if not pool.is_bundle:
        raise ConfigError(f"pool {pool.name}: plan its checkpoints first, or deploy it with `polymoe deploy`.")
    return str(Path(pool.sources[0]).expanduser().absolute())


def _pool(pool: Pool, bundle: str, grace: float) -> Any:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from polymoe.deploy.replica import EngineReplica

    engine = pool.engine_config(bundle)
    scaling: dict[str, Any] = {"num_replicas": pool.replicas}
    if (auto := pool.autoscaling) is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": auto.min_replicas,
                "max_replicas": auto.max_replicas,
                "initial_replicas": min(max(pool.replicas, auto.min_replicas), auto.max_replicas),
                "policy": {
                    "policy_function": "polymoe.deploy.scaling:PoolPolicy",
                    "policy_kwargs": {"ongoing": auto.ongoing_requests, "most_first_token": auto.first_token},
                },
                "upscale_delay_s": auto.upscale_delay,
                "downscale_delay_s": auto.downscale_delay,
                # The variable that Ray names in place of this option has no effect in 2.60.
                "metrics_interval_s": _WORK_PERIOD,
                "look_back_period_s": _WORK_MEAN_OF,
            }
        }
    deployment = serve.deployment(
        name=pool.name,
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
        max_constructor_retry_count=3,  # what is wrong with a bundle or a device is wrong the next time
        max_ongoing_requests=1000,  # of questions about the replica; generation goes past Ray
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_PERIOD,
        request_router_config=RequestRouterConfig(
            request_router_class="polymoe.deploy.router.ResidencyRouter",
            request_routing_stats_period_s=_ROUTING_STATS_PERIOD,
        ),
        **scaling,
    )(EngineReplica)
    return with_version(deployment, _pool_version(pool, bundle, grace)).bind(engine, grace)


def _pool_version(pool: Pool, bundle: str, grace: float) -> str:
    """Changes with whatever replicas are to be replaced for; what was added while serving is not that.

    Autoscaling is: a replica of Ray's reports what a policy goes by only if its deployment had one when it started.
    """
    manifest = read_manifest(Path(bundle).expanduser())
    planned = [record for record in manifest.files if not record.path.startswith(f"{ADDITIONS}/")]
    reports = pool.autoscaling is not None
    return _digest(pool.engine_config(bundle), pool.cpus, pool.gpus, grace, planned, reports)


def _digest(*content: Any) -> str:
    encoded = msgspec.json.encode([version("polymoe"), *content], enc_hook=str, order="deterministic")
    return sha256(encoded).hexdigest()[:32]
