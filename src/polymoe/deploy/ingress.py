"""The server's application over `RayClient`, in a Ray actor: with a port of its own, or behind Ray's proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from polymoe.deploy.config import LIMITS, DeployConfig
from polymoe.errors import EngineDeadError, PolymoeError
from polymoe.server.errors import UnavailableError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from polymoe.deploy.ray_client import RayClient
    from polymoe.server.state import ServerState

_LOOK_EVERY = 0.05  # seconds
_LINGER = 1.0  # seconds
_LAST_WORDS = 4.0  # seconds of the grace time in which streams are ended with an error


def make_app(config: DeployConfig, bundles: Mapping[str, str]) -> tuple[FastAPI, RayClient]:
    """The application, and the client that is to be started. bundles: pool -> folder."""
    import ray
    from ray import serve

    from polymoe.deploy.ray_client import RayClient
    from polymoe.server.app import create_app

    client = RayClient(
        {pool.name: serve.get_deployment_handle(pool.name) for pool in config.pools},
        {pool.name: pool.shares for pool in config.pools},
        {pool.name: pool.engine_config(bundles[pool.name]) for pool in config.pools},
        ray.get_runtime_context().get_node_id(),
    )
    return create_app(client, config.server), client


def share_limits(app: FastAPI) -> asyncio.Task[None]:
    """Count what keys use together with the other ingresses, until the task is cancelled."""
    from ray import serve

    from polymoe.deploy.shared_limits import keep_exchanging

    own = serve.get_replica_context().replica_id.unique_id
    handle = serve.get_deployment_handle(LIMITS).options(method_name="hear")
    return asyncio.create_task(keep_exchanging(app.state.keys, own, handle.remote))


async def _start(client: RayClient, state: ServerState) -> None:
    await client.start()
    state.settings.check_variants(list(client.processor.variants))
    await state.encoder.warm_up()


async def _stop(client: RayClient, state: ServerState) -> None:
    state.draining = True
    await client.close()
    await state.encoder.close()


class Ingress:
    """Listens on the configured port of the node that Ray puts it on; several of one node share the port."""

    async def __init__(  # type: ignore[misc]
        self, config: DeployConfig, bundles: Mapping[str, str], *pools: Any
    ) -> None:
        del pools
        from polymoe.server.serve import HttpServer, bind, uvicorn_config

        settings = config.server
        app, self._client = make_app(config, bundles)
        self._state: ServerState = app.state.server
        await _start(self._client, self._state)
        self._socket = bind(settings.host, settings.port, shared=True)
        self._http = HttpServer(uvicorn_config(app, settings))
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        while not self._http.started:
            if self._serving.done():
                await self._serving
                raise PolymoeError("the HTTP server ended while it started")
            await asyncio.sleep(_LOOK_EVERY)
        self._grace = settings.grace
        self._limits = share_limits(app) if config.shares_limits else None

    async def pid(self) -> int:
        """Of this process, for tests and for operators."""
        return os.getpid()

    async def check_health(self) -> None:
        """Raises when nobody listens any more; Ray then starts another ingress."""
        if self._serving.done():
            raise EngineDeadError("The HTTP server has ended.")

    async def __del__(self) -> None:
        """Another ingress has the port by now, or nobody shall: what was accepted is answered."""
        deadline = time.monotonic() + self._grace - _LAST_WORDS - _LINGER
        await self._state.variants.close()
        if self._limits is not None:
            self._limits.cancel()
        for server in self._http.servers:
            server.close()
        self._socket.close()
        await asyncio.sleep(_LINGER)  # who was accepted last has not asked yet
        while self._state.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_EVERY)
        self._state.draining = True
        self._client.fail_all(UnavailableError("The server is shutting down.", code="draining"))
        self._http.should_exit = True
        await asyncio.wait({self._serving}, timeout=_LAST_WORDS)
        await _stop(self._client, self._state)


def behind_proxy(config: DeployConfig, bundles: Mapping[str, str]) -> Any:
    """A class for `serve.deployment` whose replicas answer what Ray's proxy sends them."""
    from ray import serve

    def build() -> FastAPI:
        app, client = make_app(config, bundles)
        state, its_own = app.state.server, app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with its_own(app):
                await _start(client, state)
                limits = share_limits(app) if config.shares_limits else None
                yield
                if limits is not None:
                    limits.cancel()
                await _stop(client, state)

        app.router.lifespan_context = lifespan
        return app

    return serve.ingress(build)()
