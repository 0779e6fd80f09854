"""The connections of one ingress to the replicas of one pool, and what all of them hold.

A version that is added is loaded by every replica, or by none; a replica that comes later loads it before it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polymoe.bundle.live import Addition
from polymoe.bundle.manifest import read_manifest
from polymoe.client.output import OutputProcessor
from polymoe.client.versions import Versions
from polymoe.config import EngineConfig
from polymoe.deploy.link import ReplicaLink
from polymoe.deploy.merge import renumbered
from polymoe.deploy.wire import Address
from polymoe.errors import EngineDeadError, PolymoeError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_AVOIDED_FOR = 1.0  # seconds, of a replica that was lost: Ray may not know yet
_ANSWER_WITHIN = 5.0  # seconds


class PoolLinks:
    """All methods belong to one event loop.

    Args:
        handle: of the pool's deployment.
        node: Ray's name of this node; replicas on it are reached by a socket's path.
        places: version -> its place in this ingress; shared by its pools.
        processor: gives the ingress's, which says what names mean.
        learn: awaited when the pool is found to serve something else than `info` said.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        config: EngineConfig,
        node: str,
        places: dict[str, int],
        processor: Callable[[], OutputProcessor],
        learn: Callable[[], Awaitable[None]],
    ) -> None:
        self.handle, self.config = handle, config
        self.links: dict[str, ReplicaLink] = {}  # Ray's name of a replica -> the connection
        self._node, self._places, self._processor, self._learn = node, places, processor, learn
        self._info: EngineInfo | None = None
        self._is_known = False  # a replica with the configured bundle was seen
        self._connecting: dict[str, asyncio.Task[ReplicaLink]] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._avoided: dict[str, float] = {}  # replica -> until when
        self._additions: dict[str, tuple[str, Addition]] = {}  # version -> what was added here, and its folder

    @property
    def info(self) -> EngineInfo:
        """With this ingress's places."""
        assert self._info is not None
        return self._info

    @property
    def versions(self) -> Versions:
        """Which versions the pool holds, and what names mean there."""
        return Versions(self.info.variants, self.info.names)

    async def start(self) -> None:
        """Wait for a replica."""
        self._info = renumbered(msgspec.msgpack.decode(await self.handle.info.remote(), type=EngineInfo), self._places)

    async def close(self) -> None:
        for task in [*self._watches, *self._connecting.values()]:
            task.cancel()
        await asyncio.gather(*(link.shutdown() for link in list(self.links.values())))

    async def stats(self) -> list[EngineStats]:
        """Of every replica that answers."""
        answers = await self._ask_all("stats")
        return [msgspec.msgpack.decode(answer, type=EngineStats) for answer in answers if isinstance(answer, bytes)]

    @property
    def work(self) -> dict[str, int]:
        """Replica -> sequences of this ingress that it works on."""
        return {name: link.num_sequences for name, link in self.links.items()}

    async def _ask_all(self, method: str) -> list[Any]:
        answers = self.handle.broadcast(method).results_async(timeout_s=_ANSWER_WITHIN, return_exceptions=True)
        found: list[Any] = await answers
        return found

    # --- connections

    @property
    def avoided(self) -> set[str]:
        """Replicas that were lost a moment ago."""
        now = time.monotonic()
        self._avoided = {name: until for name, until in self._avoided.items() if until > now}
        return set(self._avoided)

    def avoid(self, name: str) -> None:
        self._avoided[name] = time.monotonic() + _AVOIDED_FOR

    async def connect_all(self) -> list[ReplicaLink]:
        """To every replica that answers; those that cannot be reached are left out."""
        there = [Replica(*answer) for answer in await self._ask_all("here") if isinstance(answer, tuple)]
        links = await asyncio.gather(*(self.connect(replica) for replica in there), return_exceptions=True)
        return [link for link in links if isinstance(link, ReplicaLink)]

    async def connect(self, chosen: Any) -> ReplicaLink:
        """The connection to a replica (a `Replica`, or Ray's `ReplicaSelection`), once for all who wait for it. Raises
        `EngineDeadError`."""
        name = chosen.replica_id
        if (link := self.links.get(name)) is not None:
            return link
        if name not in self._connecting:
            task = asyncio.create_task(self._new_link(chosen))
            self._connecting[name] = task
            task.add_done_callback(lambda _: self._connecting.pop(name, None))
        return await asyncio.shield(self._connecting[name])

    async def _new_link(self, chosen: Any) -> ReplicaLink:
        name, metadata = chosen.replica_id, chosen.replica_metadata
        if chosen.node_id == self._node:
            address = Address(path=metadata["path"], token=metadata["token"])
        else:
            answers = await self._ask_all("reach")
            reached: dict[str, bytes] = dict(answer for answer in answers if isinstance(answer, tuple))
            if name not in reached:
                raise EngineDeadError(f"The replica {name} does not answer.")
            address = msgspec.msgpack.decode(reached[name], type=Address)
        link = ReplicaLink(name, address, self.config, self._processor())
        try:
            info = await link.start()
            if metadata["bundle"] == self.config.bundle:
                await self._take_note(info)
                await self._bring_up_to_date(link)
        except EngineDeadError:
            raise
        except PolymoeError as error:
            await link.shutdown()
            raise EngineDeadError(f"The replica {name} cannot serve what it has to: {error}") from error
        self.links[name] = link
        watch = asyncio.create_task(self._until_lost(link))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return link

    async def _until_lost(self, link: ReplicaLink) -> None:
        await link.dead.wait()
        if self.links.get(link.name) is link:
            del self.links[link.name]
            self.avoid(link.name)
        await link.shutdown()

    async def _take_note(self, info: EngineInfo) -> None:
        """The first replica with the configured bundle says what the pool serves: what `start` asked may have been one
        that is being replaced. From then on this ingress says it."""
        if not self._is_known:
            self._is_known = True
            before, self._info = self._info, renumbered(info, self._places)
            if before != self._info:
                await self._learn()

    # --- variants that come and go

    async def add_variant(self, folder: str, addition: Addition) -> VariantInfo:
        """Every replica loads it, or none holds it. Raises as `AsyncEngineClient.add_variant`."""
        links = await self.connect_all()
        if not links:
            raise EngineDeadError("No replica answers.")
        self._additions[addition.version] = folder, addition
        tasks = {link: asyncio.ensure_future(link.add_variant(folder, addition)) for link in links}
        try:
            await asyncio.wait(tasks.values())
            # A replica that was lost meanwhile does not count: whoever takes its place loads it.
            errors = [e for t in tasks.values() if (e := t.exception()) and not isinstance(e, EngineDeadError)]
            loaded = [task.result() for task in tasks.values() if task.exception() is None]
            if errors or not loaded:
                raise errors[0] if errors else EngineDeadError("No replica is left.")
        except BaseException:
            self._additions.pop(addition.version, None)
            await asyncio.shield(_undo(tasks))
            raise
        place = self._places.setdefault(addition.version, len(self._places))
        info = msgspec.structs.replace(loaded[0], place=place)
        self._info = msgspec.structs.replace(self.info, variants=[*self.info.variants, info])
        return info

    def drop_variant(self, version: str) -> Awaitable[None]:
        """From now on nobody can ask for a version that no name means; every replica frees it when its last request has
        ended, which is awaited."""
        self._additions.pop(version, None)
        kept = [variant for variant in self.info.variants if variant.version != version]
        self._info = msgspec.structs.replace(self.info, variants=kept)
        return self._drop(version)

    async def _drop(self, version: str) -> None:
        drops = (link.drop_variant(held) for link in list(self.links.values()) if (held := _held(link, version)))
        for error in await asyncio.gather(*drops, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, EngineDeadError):
                raise error

    def point(self, names: Mapping[str, VariantInfo]) -> None:
        """What names mean here. Every replica is told, for ingresses that come later; requests name versions."""
        self._info = msgspec.structs.replace(self.info, names={name: info.place for name, info in names.items()})
        for link in list(self.links.values()):
            with contextlib.suppress(EngineDeadError):  # who takes its place starts with them
                self._point_there(link, names)

    def _point_there(self, link: ReplicaLink, names: Mapping[str, VariantInfo]) -> None:
        meant = {name: held for name, info in names.items() if (held := _held(link, info.version)) is not None}
        link.point(meant)
        link.tell_names(meant)

    async def _bring_up_to_date(self, link: ReplicaLink) -> None:
        """What was added while the replica started is loaded, what was removed goes."""
        if not link.info.max_variants:
            return
        versions = self.versions
        wanted = {held.version for held in versions.held.values()} | self._additions.keys()
        folder = Path(self.config.bundle).expanduser().resolve()
        manifest = await asyncio.to_thread(read_manifest, folder)
        additions = {a.version: (str(folder / a.folder), a) for a in manifest.live_state.additions}
        for version, (place, addition) in {**additions, **self._additions}.items():
            if version in wanted and _held(link, version) is None:
                await link.add_variant(place, addition)
        self._point_there(link, {name: versions.held[place] for name, place in versions.names.items()})
        for held in list(link.processor.versions.held.values()):
            if held.version not in wanted:
                await link.drop_variant(held)


@dataclass(frozen=True)
class Replica:
    """As much of Ray's `ReplicaSelection` as a connection needs."""

    replica_id: str
    node_id: str
    replica_metadata: dict[str, Any]


async def _undo(tasks: Mapping[ReplicaLink, asyncio.Future[VariantInfo]]) -> None:
    """Nothing of a version stays where it was loaded, or still is."""
    for task in tasks.values():
        task.cancel()  # of what is being loaded; the link tells the engine
    await asyncio.wait(tasks.values())
    loaded = [(link, task.result()) for link, task in tasks.items() if not task.cancelled() and not task.exception()]
    await asyncio.gather(*(link.drop_variant(info) for link, info in loaded), return_exceptions=True)


def _held(link: ReplicaLink, version: str) -> VariantInfo | None:
    """A version as this replica calls it."""
    return next((held for held in link.processor.versions.held.values() if held.version == version), None)
