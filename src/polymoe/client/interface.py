"""What the HTTP application needs of whoever runs its requests: an engine's process, or many of them elsewhere."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from polymoe.client.output import OutputProcessor
from polymoe.client.request_stream import RequestStream
from polymoe.config import EngineConfig
from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.protocol.request import QoS, SamplingParams

Prompt = tuple[str | None, list[int]]  # (text if the client sent text, token ids)


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
