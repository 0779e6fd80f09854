"""One pool of a deployment as the admin API sees it: what its replicas hold, and what names mean there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from polymoe.bundle.live import Addition
from polymoe.client.versions import Versions
from polymoe.config import EngineConfig
from polymoe.deploy.merge import merged_stats
from polymoe.deploy.pool_links import PoolLinks
from polymoe.errors import ChangeRefusedError, EngineDeadError, PolymoeError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo


class Whole(Protocol):
    """The deployment, whose other pools may hold the same versions: `RayClient`."""

    async def hold(self, info: VariantInfo) -> None: ...

    def let_go(self, info: VariantInfo) -> None: ...

    def rename(self) -> None: ...

    def requests_of(self, info: VariantInfo) -> list[str]: ...

    def last_used(self, info: VariantInfo) -> float: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...


class PoolClient:
    """A `client.interface.LiveClient`."""

    def __init__(self, whole: Whole, links: PoolLinks) -> None:
        self._whole, self._links = whole, links

    @property
    def config(self) -> EngineConfig:
        return self._links.config

    @property
    def info(self) -> EngineInfo:
        return self._links.info

    @property
    def versions(self) -> Versions:
        return self._links.versions

    async def stats(self) -> EngineStats:
        """Of its replicas. Raises `EngineDeadError` when none answers."""
        if not (parts := await self._links.stats()):
            raise EngineDeadError("No replica answers.")
        return merged_stats(parts)

    async def add_variant(self, folder: str, addition: Addition) -> VariantInfo:
        """Every replica loads it, or none holds it. Raises as `AsyncEngineClient.add_variant`."""
        info = await self._links.add_variant(folder, addition)
        try:
            await self._whole.hold(info)
        except BaseException as error:  # a cancellation too: nobody else knows that the replicas have it
            await asyncio.shield(self.drop_variant(info))
            if isinstance(error, PolymoeError):
                raise ChangeRefusedError(str(error)) from error
            raise
        return info

    async def drop_variant(self, info: VariantInfo) -> None:
        """Every replica frees a version that no name means any more, when its last request has ended."""
        dropping = self._links.drop_variant(info.version)
        self._whole.let_go(info)
        await dropping

    def point(self, names: Mapping[str, VariantInfo]) -> None:
        """What `model` in requests means from now on, in one step for all replicas: requests name versions."""
        self._links.point(names)
        self._whole.rename()

    def requests_of(self, info: VariantInfo) -> list[str]:
        """Ids of the requests that run on a version, in any pool."""
        return self._whole.requests_of(info)

    def last_used(self, info: VariantInfo) -> float:
        """As `AsyncEngineClient.last_used`, of this ingress."""
        return self._whole.last_used(info)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests early."""
        self._whole.abort(request_ids)
