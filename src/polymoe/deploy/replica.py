"""One engine of a pool, in a Ray actor."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgspec

from polymoe.config import EngineConfig
from polymoe.deploy.relay import Relay, drain
from polymoe.errors import EngineDeadError

# Seconds without a sign of life from an engine that has work, after which Ray is told that the replica is unwell.
_STUCK = 120.0
_STATS_WITHIN = 5.0  # seconds

_encode = msgspec.msgpack.Encoder().encode


class EngineReplica:
    """Requests and tokens go past Ray, over `Relay`. The methods here are called by Ray and, by name, by ingresses.

    Args: grace: seconds that running requests have when the replica is to end.
    """

    async def __init__(self, config: EngineConfig, grace: float = 30.0) -> None:  # type: ignore[misc]
        self._relay, self._grace = Relay(config), grace
        await self._relay.start()
        self._address = await self._relay.listen()
        self._watch = asyncio.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        """A replica without an engine would be an idle one, to which the router sends everything: it ends at once, and
        Ray starts another."""
        await self._relay.dead.wait()
        await self._relay.close(0.0)
        os._exit(1)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Where ingresses of this node find it, and what it serves."""
        return {"path": self._address.path, "token": self._address.token, "bundle": self._relay.config.bundle}

    async def here(self) -> tuple[str, str, dict[str, Any]]:
        """(Ray's name of this replica, Ray's name of its node, its metadata)."""
        import ray

        return _own_name(), ray.get_runtime_context().get_node_id(), await self.record_replica_metadata()

    async def reach(self) -> tuple[str, bytes]:
        """(Ray's name of this replica, where ingresses of other nodes find it): only when one asks is it reachable."""
        import ray

        return _own_name(), _encode(await self._relay.listen(ray.util.get_node_ip_address()))

    async def info(self) -> bytes:
        return _encode(self._relay.info)

    async def stats(self) -> bytes:
        return _encode(await self._relay.stats())

    async def pid(self) -> tuple[int | None, str]:
        """(of the engine's process, the bundle that it serves), for tests and for operators."""
        return self._relay.pid, self._relay.config.bundle

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router ranks by."""
        relay, taken_at = self._relay, time.time()
        try:
            stats = await asyncio.wait_for(relay.stats(), _STATS_WITHIN)
        except (TimeoutError, EngineDeadError):
            return {}
        return {
            "slots": relay.info.slots,
            "loaded": [stats.names[index] for index in stats.loaded],
            "work": relay.num_sequences,
            "taken_at": taken_at,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scaling.py` decides by: Ray itself sees none of the requests."""
        return {"work": self._relay.num_sequences, "first_token": self._relay.first_token()}

    async def check_health(self) -> None:
        """Raises when the engine is dead or hangs; Ray then replaces this replica."""
        if self._relay.dead.is_set():
            raise EngineDeadError("The engine has stopped.")
        if self._relay.is_stuck(_STUCK):
            raise EngineDeadError("The engine makes no progress.")

    async def __del__(self) -> None:
        """Ray has told the ingresses to use other replicas; what runs here comes to its end."""
        self._watch.cancel()
        await drain(self._relay, self._grace)
        await self._relay.close()


def _own_name() -> str:
    from ray import serve

    name: str = serve.get_replica_context().replica_id.unique_id
    return name
