"""An ingress's end of the connection to one replica, and streams that go on with another one where that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from polymoe.client.client import AsyncEngineClient
from polymoe.client.connection import Engine, Streams
from polymoe.client.interface import Prompt
from polymoe.client.output import OutputProcessor
from polymoe.client.output_sequence import CompletionChunk
from polymoe.client.request_stream import RequestStream
from polymoe.config import EngineConfig
from polymoe.deploy.wire import Address, Hello, Point, notice_loss
from polymoe.errors import EngineDeadError
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.messages import frame
from polymoe.protocol.request import QoS, RequestOutput, SamplingParams

_CONNECT_WITHIN = 5.0  # seconds


class Replica:
    """An engine elsewhere, which ends with nobody's connection."""

    pid: int | None = None

    def __init__(self, name: str, address: Address) -> None:
        self.name, self.address = name, address
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> Streams:
        address = self.address
        try:
            async with asyncio.timeout(_CONNECT_WITHIN):
                if address.path:
                    reader, writer = await asyncio.open_unix_connection(address.path)
                else:
                    reader, writer = await asyncio.open_connection(address.host, address.port)
        except (OSError, TimeoutError) as error:
            raise EngineDeadError(f"The replica {self.name} cannot be reached: {error}") from error
        notice_loss(writer)
        writer.write(frame(Hello(address.token)))
        self._writer = writer
        return reader, writer

    def kill(self) -> None:
        """It is not ours; what is lost is the connection."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def wait(self, grace: float) -> None:  # noqa: ARG002
        """It goes on; the connection ends."""
        if self._writer is not None:
            self._writer.close()


class ReplicaLink(AsyncEngineClient):
    """The client of an engine's process, whose process runs elsewhere: a lost connection is a dead engine.

    Args:
        name: Ray's, of the replica.
        beside: whose tokenizers are used too.
    """

    def __init__(self, name: str, address: Address, config: EngineConfig, beside: OutputProcessor | None) -> None:
        super().__init__(config)
        self.name, self.address = name, address
        self._beside = beside

    def _engine(self) -> Engine:
        return Replica(self.name, self.address)

    def tell_names(self, names: Mapping[str, VariantInfo]) -> None:
        """For ingresses that connect later."""
        self._alive().send(Point({name: info.version for name, info in names.items()}))


@dataclass(frozen=True)
class Asked:
    """A client's request, whole, so that it can be asked again; arguments of `AsyncEngineClient.submit`."""

    variant: VariantInfo
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    cache_salt: str
    qos: QoS
    whole: bool = True


class RetriedStream(RequestStream):
    """What a replica sends for a request; where that one is lost and nobody saw any of the answer, what another sends.

    Args:
        lost: called, from the event loop, when it may be submitted again.
        closed: called when nobody waits for it any more.
    """

    def __init__(
        self,
        request_id: str,
        asked: Asked,
        lost: Callable[[RetriedStream], None],
        closed: Callable[[RetriedStream], None],
    ) -> None:
        super().__init__(request_id, len(asked.prompts), self._abort_attempt, asked.sampling.n)
        self.asked = asked
        self.is_closed = False
        self._attempt: _Attempt | None = None
        self._lost, self._closed = lost, closed

    async def submit_to(self, link: ReplicaLink, variant: VariantInfo | None = None) -> None:
        """variant: what that replica's pool has for what was asked for. Raises as `AsyncEngineClient.submit`."""
        asked, variant = self.asked, variant or self.asked.variant
        versions = link.processor.versions
        # A replica with another bundle has another version of the name, and is right to use it.
        model = variant.key if versions.find(variant.key) is not None else variant.name
        attempt = self._attempt = _Attempt(self, link)
        try:
            await link.submit(
                self.request_id, model, asked.prompts, asked.sampling, cache_salt=asked.cache_salt, qos=asked.qos,
                whole=asked.whole, stream=attempt,
            )  # fmt: skip
            attempt.accept()
        except BaseException:
            self._attempt = None
            raise
        if self.is_closed:
            attempt.close()

    def close(self) -> None:
        super().close()
        if not self.is_closed:
            self.is_closed = True
            self._closed(self)

    def _abort_attempt(self, _: list[str]) -> None:
        if self._attempt is not None:
            self._attempt.close()

    def lose(self, attempt: _Attempt, error: Exception) -> None:
        """The replica of this attempt is gone, or gave up."""
        if self._attempt is not attempt:
            return
        self._attempt = None
        if isinstance(error, EngineDeadError) and self.restart():
            self._lost(self)
        else:
            self.fail(error)

    def is_of(self, attempt: _Attempt) -> bool:
        return self._attempt is attempt


class _Attempt(RequestStream):
    """A request at one replica, whose chunks go on to the client's stream."""

    def __init__(self, whole: RetriedStream, link: ReplicaLink) -> None:
        super().__init__(whole.request_id, whole.num_prompts, link.abort)
        self._whole = whole
        self._is_accepted = False
        self._failed: Exception | None = None

    def accept(self) -> None:
        """Raises what has ended it since it was accepted."""
        if self._failed is not None:
            raise self._failed
        self._is_accepted = True

    def push_chunk(self, chunk: CompletionChunk) -> None:
        if self._failed is None and self._whole.is_of(self):
            self._whole.push_chunk(chunk)

    def push_result(self, result: RequestOutput) -> None:
        self.results[result.prompt_index] = result
        if self._failed is None and self._whole.is_of(self):
            self._whole.push_result(result)

    def fail(self, error: Exception) -> None:
        if self._failed is None:
            self._failed = error
            if self._is_accepted:  # else whoever submits it is told
                self._whole.lose(self, error)
