"""`build_app`: a deploy configuration as an application of Ray Serve."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymoe.deploy.config import DeployConfig, Pool, read_deploy_config
from polymoe.deploy.installed import require_ray
from polymoe.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

INGRESS = "ingress"
_ROUTING_STATS_PERIOD = 1.0  # seconds between two reports of what is in a replica's slots
_HEALTH_PERIOD = 2.0  # seconds


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
        config = read_deploy_config(Path(config["config"]))
    folders = {pool.name: _bundle(pool, bundles or {}) for pool in config.pools}
    pools = [_pool(pool, folders[pool.name], config.server.grace) for pool in config.pools]
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,  # the engines refuse with 429
        graceful_shutdown_timeout_s=config.server.grace,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_PERIOD,
    )(serve.ingress(_app_builder(config, folders))())
    return ingress.bind(*pools)


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
                "target_ongoing_requests": auto.ongoing_requests,
                "upscale_delay_s": auto.upscale_delay,
                "downscale_delay_s": auto.downscale_delay,
            }
        }
    deployment = serve.deployment(
        name=pool.name,
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
        # As many as the engine holds: whoever comes when its queue is full gets the engine's own 429.
        max_ongoing_requests=engine.max_num_seqs + engine.max_waiting,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_PERIOD,
        request_router_config=RequestRouterConfig(
            request_router_class="polymoe.deploy.router.ResidencyRouter",
            request_routing_stats_period_s=_ROUTING_STATS_PERIOD,
        ),
        **scaling,
    )(EngineReplica)
    return deployment.bind(engine)


def _app_builder(config: DeployConfig, bundles: Mapping[str, str]) -> Any:
    """A function that an ingress replica calls to make its app."""

    first = config.pools[0]
    shown = first.engine_config(bundles[first.name])

    def build() -> FastAPI:
        from ray import serve

        from polymoe.deploy.ray_client import RayClient
        from polymoe.server.app import create_app

        handles = {pool.name: serve.get_deployment_handle(pool.name) for pool in config.pools}
        client = RayClient(handles, {pool.name: pool.shares for pool in config.pools}, shown)
        app = create_app(client, config.server)

        state, its_own = app.state.server, app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with its_own(app):
                await client.start()
                config.server.check_variants(list(client.processor.variants))
                await state.encoder.warm_up()
                yield
                state.draining = True
                client.fail_all()
                await state.encoder.close()

        app.router.lifespan_context = lifespan
        return app

    return build
