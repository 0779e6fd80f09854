"""The engine process as seen from an asyncio program."""

import asyncio
import contextlib
import importlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from polymoe.bundle.live import Addition
from polymoe.client.connection import Connection, Engine, EngineProcess
from polymoe.client.interface import LiveClient, Prompt
from polymoe.client.output import OutputProcessor, StepOutput
from polymoe.client.output_sequence import CompletionChunk
from polymoe.client.request_stream import RequestStream
from polymoe.client.versions import Versions
from polymoe.config import EngineConfig
from polymoe.errors import BundleError, ChangeRefusedError, EngineDeadError, PolymoeError, RequestError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.request import QoS, SamplingParams, TokenOutput

_EQUAL = QoS()


class AsyncEngineClient:
    """Starts the engine process and talks to it. All methods belong to one event loop.

    Args: `module`: what the process runs: `polymoe.engine.process`, or another module's call of its `main`.
    """

    def __init__(self, config: EngineConfig, module: str = "polymoe.engine.process") -> None:
        self.config, self.module = config, module
        self.heartbeat_every = 10.0  # seconds of silence after which the engine is asked for a sign of life
        self.dead = asyncio.Event()  # set when the engine ended without being told to
        self._connection: Connection | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._processor: OutputProcessor | None = None
        self._beside: OutputProcessor | None = None  # whose tokenizers and grammars are used too
        self._info: EngineInfo | None = None
        self._death: PolymoeError | None = None
        self._closing = False
        self._streams: dict[str, RequestStream] = {}
        self._last_used: dict[int, float] = {}  # place -> time

    # --- life

    async def start(self, on_progress: Callable[[str, float], None] | None = None) -> EngineInfo:
        """Start the process and wait until it has loaded. Raises `PolymoeError` when it cannot."""
        self._connection = Connection(self._engine(), self._take, on_progress, self._end)
        imported = asyncio.create_task(asyncio.to_thread(importlib.import_module, "transformers.models.auto"))
        try:
            info = await self._connection.load()
            await imported  # for the tokenizers; while the engine loaded
            processor = OutputProcessor(info, self._beside)
            await asyncio.to_thread(processor.load_tokenizers)
        except BaseException:
            await self.shutdown(0.0)
            raise
        self._info, self._processor = msgspec.structs.replace(info, variants=processor.versions.named()), processor
        self._heartbeat = asyncio.create_task(self._beat())
        return info

    def _engine(self) -> Engine:
        return EngineProcess(self.module, self.config)

    async def restart(self, on_progress: Callable[[str, float], None] | None = None) -> EngineInfo:
        """After the engine's death: another process. Raises as `start`."""
        await self.shutdown(0.0)
        self._death, self._info, self._processor, self._closing = None, None, None, False
        self.dead.clear()
        return await self.start(on_progress)

    def kill(self) -> None:
        """End the process at once, as if it had died."""
        if self._connection is not None:
            self._connection.engine.kill()

    async def shutdown(self, grace: float = 5.0) -> None:
        """End the process: politely, and after `grace` seconds by force. Open streams raise `EngineDeadError`."""
        self._closing = True
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._connection is not None:
            await self._connection.shutdown(grace)

    @property
    def info(self) -> EngineInfo:
        """Raises `EngineDeadError` before `start` has returned."""
        if self._info is None:
            raise self._death or EngineDeadError("The engine has not started.")
        return self._info

    @property
    def processor(self) -> OutputProcessor:
        """Tokenizers and variants. Raises `EngineDeadError` before `start` has returned."""
        if self._processor is None:
            raise self._death or EngineDeadError("The engine has not started.")
        return self._processor

    @property
    def versions(self) -> Versions:
        """Which versions are held, and what names mean. Raises as `processor`."""
        return self.processor.versions

    @property
    def parts(self) -> Mapping[str, LiveClient]:
        return {"": self}

    @property
    def pid(self) -> int | None:
        return None if self._connection is None else self._connection.engine.pid

    @property
    def is_ready(self) -> bool:
        return self._processor is not None and self.is_alive

    @property
    def is_alive(self) -> bool:
        return self._connection is not None and self._death is None and not self._closing

    @property
    def open_streams(self) -> list[str]:
        """Ids of the requests that somebody still waits for."""
        return list(self._streams)

    @property
    def num_sequences(self) -> int:
        """Those that run or wait for somebody here."""
        return 0 if self._processor is None else self._processor.num_sequences

    def is_stuck(self, timeout: float) -> bool:
        """Whether there is work, or a question, but nothing was heard for `timeout` seconds."""
        if self._connection is None:
            return False
        silent = time.monotonic() - self._connection.last_heard
        return bool(self._streams or self._connection.is_asked) and silent > timeout

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
        stream: RequestStream | None = None,
    ) -> RequestStream:
        """Give prompts to the engine, all or none. What is wrong with them is found here; whether there is room
        for them is for the engine to say. Not `whole`: the stream's results have no text, tokens and logprobs.
        `stream`: takes what comes, in place of a new one.

        Returns when the engine has accepted them. Raises `RequestError` (a wrong request, or `OverloadedError`) or
        `EngineDeadError`.
        """
        processor, connection = self.processor, self._alive()
        info = processor.variant(variant)
        _check_count(len(prompts), sampling.n, self.config.max_waiting)
        if not self._streams:
            connection.last_heard = time.monotonic()  # an idle engine says nothing, that is not being stuck
        stream = stream or RequestStream(request_id, len(prompts), self.abort, sampling.n)
        stream.place = info.place
        try:
            requests = []
            for p, (text, token_ids) in enumerate(prompts):
                requests += processor.add_request(
                    request_id,
                    info.key,
                    token_ids,
                    sampling,
                    prompt_index=p,
                    text=text,
                    cache_salt=cache_salt,
                    qos=qos,
                    arrival_time=time.monotonic(),
                    whole=whole,
                )
                self._streams[request_id] = stream
                self._last_used[info.place] = time.monotonic()
            await connection.add(requests)
        except BaseException:
            if self._streams.get(request_id) is stream:
                stream.close()
            raise
        return stream

    async def generate(
        self, request_id: str, variant: str, prompt: Prompt, sampling: SamplingParams
    ) -> AsyncIterator[CompletionChunk]:
        """One prompt, chunk by chunk. Closing the generator aborts."""
        with await self.submit(request_id, variant, [prompt], sampling) as stream:
            async for chunks in stream:
                for chunk in chunks:
                    yield chunk

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests early (ids as given to `submit`); a stream still read sees reason "abort"."""
        if self._processor is not None:
            self._deliver(self._processor.abort(request_ids))

    def fail_all(self, error: PolymoeError) -> None:
        """End every stream with this error, and abort its requests in the engine; those that it has not accepted yet
        too."""
        if self._connection is not None:
            self._connection.give_up_additions(error)
        for stream in list(self._streams.values()):
            stream.fail(error)
            stream.close()

    async def stats(self, routing: bool = False) -> EngineStats:
        """Raises `EngineDeadError`. A busy engine answers between two steps. `routing`: see `GetStats`."""
        connection = self._alive()
        if not self._streams and not connection.is_asked:
            connection.last_heard = time.monotonic()  # as in `submit`
        return await connection.stats(routing)

    async def _beat(self) -> None:
        """An engine without work says nothing, and would seem healthy if it hung."""
        with contextlib.suppress(EngineDeadError):
            while True:
                await asyncio.sleep(self.heartbeat_every)
                if time.monotonic() - self._alive().last_heard > self.heartbeat_every:
                    await self.stats()

    # --- variants that come and go

    async def add_variant(self, folder: str, addition: Addition) -> VariantInfo:
        """Load a version that a planner wrote; no name means it yet. Raises `ChangeRefusedError` where the engine
        cannot, and `EngineDeadError`; all is as before then. Cancelled, it is given up."""
        info = await self._alive().add_variant(folder, addition)
        self._last_used[info.place] = time.monotonic()
        try:
            await self.processor.add_version(info)
        except BaseException as error:  # a cancellation too: nobody else knows that the engine has it
            await asyncio.shield(self._alive().drop_variant(info.place))
            if isinstance(error, BundleError):
                raise ChangeRefusedError(str(error)) from error
            raise
        return info

    async def drop_variant(self, info: VariantInfo) -> None:
        """Free a version that no name means any more, when its last request has ended."""
        self.processor.drop_version(info)
        await self._alive().drop_variant(info.place)

    def point(self, names: Mapping[str, VariantInfo]) -> None:
        """What `model` in requests means from now on."""
        versions = self.processor.versions
        versions.names = {name: info.place for name, info in names.items()}
        self._info = msgspec.structs.replace(self.info, variants=versions.named())

    def requests_of(self, info: VariantInfo) -> list[str]:
        """Ids of the requests that run on a version."""
        return [request_id for request_id, stream in self._streams.items() if stream.place == info.place]

    def last_used(self, info: VariantInfo) -> float:
        """When a version was asked last, or was added; on the clock of `time.monotonic`."""
        return self._last_used.get(info.place, 0.0)

    # --- what the engine says

    def _take(self, outputs: list[TokenOutput]) -> None:
        self._deliver(self.processor.process(outputs))

    def _deliver(self, step: StepOutput) -> None:
        if step.aborts and self._connection is not None:
            self._connection.abort(step.aborts)
        for chunk in step.chunks:
            self._streams[chunk.request_id].push_chunk(chunk)
        for result in step.finished:
            self._streams[result.request_id].push_result(result)
        for request_id in {result.request_id for result in step.finished} - self.processor.open_requests:
            del self._streams[request_id]

    def _end(self, death: PolymoeError) -> None:
        self._death = death
        if self._processor is not None:
            self.fail_all(EngineDeadError("The engine stopped; the request cannot finish."))
        if not self._closing:
            self.dead.set()

    def _alive(self) -> Connection:
        if self._connection is None or not self.is_alive:
            raise EngineDeadError("The engine has stopped.")
        return self._connection


def _check_count(prompts: int, n: int, limit: int) -> None:
    """Raises `RequestError` for more sequences than an empty queue holds: to try again would be in vain."""
    if prompts * n > limit:
        raise RequestError(
            f"The request asks for {prompts * n} sequences at once ({prompts} prompts, n = {n}) and this server queues "
            f"at most {limit}. Send fewer prompts in a request, or a smaller n.",
            param="prompt" if prompts > limit or n == 1 else "n",
        )
