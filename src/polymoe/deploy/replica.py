"""One engine of a pool, in a Ray actor: the same client that a server on one machine uses."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.deploy.wire import Progressed, decode_generate, encode
from polymoe.errors import EngineDeadError, RequestError
from polymoe.protocol.messages import Accepted, Rejected

# Seconds without a sign of life from an engine that has work, after which Ray is told that the replica is unwell.
_STUCK = 120.0


class EngineReplica:
    """Its methods are called by the ingress, by name; `record_routing_stats` and `check_health` by Ray."""

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]
        self._client = AsyncEngineClient(config)
        await self._client.start()
        self._watch = asyncio.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        """A replica without an engine would be an idle one, to which the router sends everything: it ends at once, and
        Ray starts another."""
        await self._client.dead.wait()
        os._exit(1)

    async def generate(self, request: bytes, prefix: str = "") -> AsyncIterator[bytes]:
        """Answers of `wire`, one after the other. `prefix` is for the router."""
        del prefix
        asked, client = decode_generate(request), self._client
        try:
            if (wanted := asked.sampling.structured_outputs) is not None:
                await client.processor.grammars.prepare(client.processor.grammar_source(asked.variant, wanted))
            stream = await client.submit(
                asked.request_id, asked.variant, asked.prompts, asked.sampling, cache_salt=asked.cache_salt,
                qos=asked.qos,
            )  # fmt: skip
        except RequestError as error:
            yield encode(Rejected.of(0, error))
            return
        with stream:
            yield encode(Accepted(0))
            sent: set[int] = set()
            async for chunks in stream:
                new = stream.results.keys() - sent
                sent |= new
                yield encode(Progressed(chunks, [stream.results[index] for index in sorted(new)]))
            if rest := stream.results.keys() - sent:
                yield encode(Progressed([], [stream.results[index] for index in sorted(rest)]))

    async def info(self) -> bytes:
        return encode(self._client.info)

    async def stats(self) -> bytes:
        return encode(await self._client.stats())

    async def pid(self) -> tuple[int | None, str]:
        """(of the engine's process, the bundle that it serves), for tests and for operators."""
        return self._client.pid, self._client.config.bundle

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router ranks by."""
        info, taken_at = self._client.info, time.time()
        try:
            stats = await asyncio.wait_for(self._client.stats(), 5.0)
        except (TimeoutError, EngineDeadError):
            return {}
        return {
            "slots": info.slots,
            "loaded": [stats.names[index] for index in stats.loaded],
            "taken_at": taken_at,
        }

    async def check_health(self) -> None:
        """Raises when the engine is dead or hangs; Ray then replaces this replica."""
        if not self._client.is_alive:
            raise EngineDeadError("The engine has stopped.")
        if self._client.is_stuck(_STUCK):
            raise EngineDeadError("The engine makes no progress.")

    async def __del__(self) -> None:
        await self._client.shutdown()
