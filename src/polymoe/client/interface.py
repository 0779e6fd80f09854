"""What the HTTP application needs of whoever runs its requests: an engine's process, or many of them elsewhere."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from polymoe.bundle.live import Addition
from polymoe.client.output import OutputProcessor
from polymoe.client.request_stream import RequestStream
from polymoe.client.versions import Versions
from polymoe.config import EngineConfig
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.request import QoS, SamplingParams

Prompt = tuple[str | None, list[int]]  # (text if the client sent text, token ids)


class LiveClient(Protocol):
    """One engine, or replicas that hold the same, whose variants come and go; as `AsyncEngineClient`."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def info(self) -> EngineInfo: ...

    @property
    def versions(self) -> Versions: ...

    async def stats(self) -> EngineStats: ...

    async def add_variant(self, folder: str, addition: Addition) -> VariantInfo: ...

    async def drop_variant(self, info: VariantInfo) -> None: ...

    def point(self, names: Mapping[str, VariantInfo]) -> None: ...

    def requests_of(self, info: VariantInfo) -> list[str]: ...

    def last_used(self, info: VariantInfo) -> float: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...


class EngineClient(Protocol):
    """`AsyncEngineClient` is one; its docstrings say what each of these means. All belong to one event loop."""

    dead: asyncio.Event
    config: EngineConfig
    heartbeat_every: float

    @property
    def info(self) -> EngineInfo: ...

    @property
    def processor(self) -> OutputProcessor: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def open_streams(self) -> list[str]: ...

    @property
    def parts(self) -> Mapping[str, LiveClient]:
        """Pool -> what holds its variants; one, named "", for an engine of its own."""
        ...

    def is_stuck(self, timeout: float) -> bool: ...

    async def submit(
        self,
        request_id: str,
        variant: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        qos: QoS = ...,
        whole: bool = ...,
    ) -> RequestStream: ...

    async def stats(self, routing: bool = False) -> EngineStats: ...
