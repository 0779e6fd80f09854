"""The engines of a deployment as the HTTP application sees them: an `EngineClient` over connections to the replicas.

Ray says which replica takes a request: its handle asks the pool's request router. What follows goes past Ray: a
connection to that replica carries requests and tokens, a message a step.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from polymoe.client.interface import Prompt
from polymoe.client.output import OutputProcessor
from polymoe.client.request_stream import RequestStream
from polymoe.config import EngineConfig
from polymoe.deploy.adapter import pick
from polymoe.deploy.link import Asked, RetriedStream
from polymoe.deploy.merge import merged_info, merged_names, merged_stats
from polymoe.deploy.pool_client import PoolClient
from polymoe.deploy.pool_links import PoolLinks
from polymoe.errors import EngineDeadError, OverloadedError, PolymoeError, UnknownVariantError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.request import QoS, SamplingParams

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_EQUAL = QoS()
_PREFIX_TOKENS = 64  # of a prompt's beginning, by which requests that share one find the same replica
_TRIED_FOR = 60.0  # seconds that replicas may be lost one after the other before a request fails


class RayClient:
    """Knows the pools by name; each is a deployment whose handle routes to one of its replicas.

    Args:
        pools: name -> handle.
        shares: pool -> variant -> part of the variant's requests that goes there.
        configs: of each pool; the dashboard describes the bundle of the first one.
        node: Ray's name of this node; replicas on it are reached by a socket's path.
    """

    def __init__(
        self,
        pools: Mapping[str, DeploymentHandle],
        shares: Mapping[str, Mapping[str, float]],
        configs: Mapping[str, EngineConfig],
        node: str,
    ) -> None:
        self.config = next(iter(configs.values()))
        self.heartbeat_every = 10.0  # nobody's: Ray asks each replica itself
        self.dead = asyncio.Event()  # never set: Ray replaces replicas that die
        self._shares = shares
        self._places: dict[str, int] = {}  # version -> its place in `info`
        self._last_used: dict[str, float] = {}  # version -> time
        self._pools = {
            name: PoolLinks(handle, configs[name], node, self._places, lambda: self.processor, self._learn)
            for name, handle in pools.items()
        }
        self.parts = {name: PoolClient(self, links) for name, links in self._pools.items()}
        self._info: EngineInfo | None = None
        self._processor: OutputProcessor | None = None
        self._handles: dict[tuple[str, str], Any] = {}  # (pool, variant) -> the handle with options
        self._streams: dict[str, RetriedStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life

    async def start(self) -> None:
        """Wait for a replica of each pool, load the tokenizers and connect to all replicas."""
        await asyncio.gather(*(pool.start() for pool in self._pools.values()))
        await self._learn()
        await asyncio.gather(*(pool.connect_all() for pool in self._pools.values()))

    async def close(self) -> None:
        self.fail_all(EngineDeadError("The server is shutting down."))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))

    async def _learn(self) -> None:
        """What all replicas serve, from what each pool says."""
        info = merged_info({name: pool.info for name, pool in self._pools.items()})
        processor = OutputProcessor(info, self._processor)
        await asyncio.to_thread(processor.load_tokenizers)
        self._info = msgspec.structs.replace(info, variants=processor.versions.named())
        self._processor = processor

    def fail_all(self, error: PolymoeError) -> None:
        """End every stream with this error."""
        for stream in list(self._streams.values()):
            stream.fail(error)
            stream.close()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDeadError("The engines have not started.")
        return self._info

    @property
    def processor(self) -> OutputProcessor:
        if self._processor is None:
            raise EngineDeadError("The engines have not started.")
        return self._processor

    @property
    def is_ready(self) -> bool:
        return self._processor is not None

    @property
    def open_streams(self) -> list[str]:
        return list(self._streams)

    def is_stuck(self, timeout: float) -> bool:
        """Never: Ray asks each replica itself."""
        del timeout
        return False

    async def stats(self, routing: bool = False) -> EngineStats:
        """Of all replicas together, without the routing of tokens. Raises `EngineDeadError` when none answers."""
        del routing
        pools = [parts for pool in self._pools.values() if (parts := await pool.stats())]
        if not pools:
            raise EngineDeadError("No replica answers.")
        added = sum(max(part.added_bytes for part in parts) for parts in pools)  # every replica of a pool holds all
        return msgspec.structs.replace(merged_stats([part for parts in pools for part in parts]), added_bytes=added)

    # --- requests

    async def submit(
        self,
        request_id: str,
        variant: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        qos: QoS = _EQUAL,
        whole: bool = True,
    ) -> RequestStream:
        """As `AsyncEngineClient.submit`.

        A replica that is lost before anybody has seen a part of the answer is replaced by another one.
        """
        info = self.processor.variant(variant)
        self._last_used[info.version] = time.monotonic()
        asked = Asked(info, prompts, sampling, cache_salt, qos, whole)
        stream = RetriedStream(request_id, asked, self._submit_again, self._forget)
        self._streams[request_id] = stream
        try:
            await self._place(stream)
        except BaseException:
            stream.close()
            raise
        return stream

    def _forget(self, stream: RetriedStream) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]

    def _submit_again(self, stream: RetriedStream) -> None:
        """Its replica was lost before anybody saw anything of it."""

        async def place() -> None:
            try:
                await self._place(stream)
            except PolymoeError as error:
                stream.fail(error)

        task = asyncio.create_task(place())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _place(self, stream: RetriedStream) -> None:
        """Give a request to a replica that takes it. Raises `RequestError`, and `EngineDeadError` where replicas have
        been lost one after the other for long."""
        deadline, pause = time.monotonic() + _TRIED_FOR, 0.05
        full: set[str] = set()
        while not stream.is_closed:
            pool, variant = self._home_of(stream.asked.variant)
            name = ""
            try:
                chosen = await self._choose(pool, stream.asked, full)
                name = chosen.replica_id
                await stream.submit_to(await self._pools[pool].connect(chosen), variant)
                return
            except OverloadedError:
                if name in full:  # all are
                    raise
                full.add(name)
            except EngineDeadError as error:
                logger.warning("A replica was lost (%s): %s", stream.asked.variant.name, error)
                self._pools[pool].avoid(name)
                if time.monotonic() > deadline:
                    raise EngineDeadError("The engine stopped; the request cannot finish.") from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)

    async def _choose(self, pool: str, asked: Asked, full: set[str]) -> Any:
        """What the pool's request router says, Ray's `ReplicaSelection`; waits while there is no replica."""
        key, links = (pool, asked.variant.name), self._pools[pool]
        if key not in self._handles:
            self._handles[key] = links.handle.options(multiplexed_model_id=asked.variant.name)
        prefix, work = _prefix(asked), links.work
        try:
            async with pick(self._handles[key], prefix=prefix, work=work, avoid=full | links.avoided) as chosen:
                return chosen
        except Exception as error:  # of Ray's, of many kinds: a deployment that is being replaced or has failed
            raise EngineDeadError(f"Ray names no replica of pool {pool}: {error}") from error

    def _home_of(self, variant: VariantInfo) -> tuple[str, VariantInfo]:
        """(pool, what is asked for there), by the pools' shares.

        A name that is in several pools means a version in each, since the bundles differ: one stands for the others as
        long as it is what the name means.
        """
        homes: dict[str, VariantInfo] = {}
        for name in self.processor.versions.names_of(variant):
            for pool, links in self._pools.items():
                if pool not in homes and (found := links.versions.find(name)) is not None:
                    homes[pool] = links.versions.held[found.place]
        homes = homes or dict.fromkeys(self._homes_of(variant.version), variant)
        if not homes:
            raise UnknownVariantError(variant.key, [known.name for known in self.processor.served])
        parts = [self._shares.get(pool, {}).get(variant.name, 1.0) for pool in homes]
        return random.choices(list(homes.items()), parts)[0]

    def _homes_of(self, version: str) -> list[str]:
        return [name for name, pool in self._pools.items() if any(v.version == version for v in pool.info.variants)]

    # --- variants that come and go, for `PoolClient`

    async def hold(self, info: VariantInfo) -> None:
        """A pool holds a version that no name means yet. Raises as `OutputProcessor.add_version`."""
        self._last_used[info.version] = time.monotonic()
        if info.place not in self.processor.versions.held:
            await self.processor.add_version(info)

    def let_go(self, info: VariantInfo) -> None:
        """A pool does not hold a version any more; others may."""
        if not self._homes_of(info.version) and info.place in self.processor.versions.held:
            self.processor.drop_version(info)
            self._last_used.pop(info.version, None)

    def rename(self) -> None:
        """Names mean something else in a pool."""
        versions = self.processor.versions
        versions.names = merged_names(pool.info for pool in self._pools.values())
        self._info = msgspec.structs.replace(self.info, variants=versions.named())

    def requests_of(self, info: VariantInfo) -> list[str]:
        """Ids of the requests that run on a version."""
        return [name for name, stream in self._streams.items() if stream.asked.variant.version == info.version]

    def last_used(self, info: VariantInfo) -> float:
        """As `AsyncEngineClient.last_used`, of this ingress."""
        return self._last_used.get(info.version, 0.0)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests early."""
        for pool in self._pools.values():
            for link in pool.links.values():
                link.abort(request_ids)


def _prefix(asked: Asked) -> str:
    """A name for the beginning of the prompt, of this variant and tenant; "" for a short one."""
    tokens = asked.prompts[0][1][:_PREFIX_TOKENS]
    if len(tokens) < _PREFIX_TOKENS:
        return ""
    content = f"{asked.variant.key}\0{asked.cache_salt}\0{tokens}"
    return blake2b(content.encode(), digest_size=12).hexdigest()
