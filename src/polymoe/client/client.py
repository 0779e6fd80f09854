"""The engine process as seen from an asyncio program."""

import asyncio
import contextlib
import importlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from polymoe.bundle.live import Addition
from polymoe.client.interface import Prompt
from polymoe.client.output import OutputProcessor, StepOutput
from polymoe.client.output_sequence import CompletionChunk
from polymoe.client.request_stream import RequestStream
from polymoe.config import EngineConfig
from polymoe.errors import ChangeRefusedError, EngineDeadError, PolymoeError, RequestError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.messages import (
    HEADER_BYTES,
    Abort,
    Accepted,
    Add,
    AddVariant,
    CancelAdd,
    ChangeFailed,
    DropVariant,
    Event,
    Fatal,
    GetStats,
    Message,
    Outputs,
    Progress,
    Ready,
    Rejected,
    Shutdown,
    Start,
    Stats,
    VariantAdded,
    VariantDropped,
    body_length,
    decode_event,
    frame,
)
from polymoe.protocol.request import QoS, SamplingParams

_EQUAL = QoS()
_SECRETS = ("POLYMOE_API_KEY", "POLYMOE_ADMIN_KEY")  # variables that are none of the engine's business


class AsyncEngineClient:
    """Starts the engine process and talks to it. All methods belong to one event loop.

    Args: `module`: what the process runs: `polymoe.engine.process`, or another module's call of its `main`.
    """

    def __init__(self, config: EngineConfig, module: str = "polymoe.engine.process") -> None:
        self.config, self.module = config, module
        self.heartbeat_every = 10.0  # seconds of silence after which the engine is asked for a sign of life
        self.last_progress = time.monotonic()  # when the engine was last heard of, or was given its first work
        self.dead = asyncio.Event()  # set when the engine ended without being told to
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._on_progress: Callable[[str, float], None] | None = None
        self._processor: OutputProcessor | None = None
        self._beside: OutputProcessor | None = None  # whose tokenizers and grammars are used too
        self._info: EngineInfo | None = None
        self._death: PolymoeError | None = None
        self._closing = False
        self._submissions = itertools.count()
        self._acknowledgements: dict[int, asyncio.Future[None]] = {}
        self._streams: dict[str, RequestStream] = {}
        self._stats_waiters: list[asyncio.Future[EngineStats]] = []
        self._changes: dict[int, asyncio.Future[VariantInfo | None]] = {}
        self._place_of: dict[str, int] = {}  # request -> the place of the version that it began with

    # --- life

    async def start(self, on_progress: Callable[[str, float], None] | None = None) -> EngineInfo:
        """Start the process and wait until it has loaded. Raises `PolymoeError` when it cannot."""
        self._on_progress = on_progress
        self._ready = asyncio.get_running_loop().create_future()
        reader, self._writer = await self._open()
        self._reader_task = asyncio.create_task(self._read(reader))
        imported = asyncio.create_task(asyncio.to_thread(importlib.import_module, "transformers.models.auto"))
        try:
            info = await self._ready
            await imported  # for the tokenizers; while the engine loaded
            processor = OutputProcessor(info, self._beside)
            await asyncio.to_thread(processor.load_tokenizers)
        except BaseException:
            await self.shutdown(0.0)
            raise
        self._info, self._processor = msgspec.structs.replace(info, variants=processor.versions.named()), processor
        self._heartbeat = asyncio.create_task(self._beat())
        return info

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The way to an engine that has been told what to load."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = start_process(self.module, theirs.fileno())
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(frame(Start(self.config)))
        return reader, writer

    async def restart(self, on_progress: Callable[[str, float], None] | None = None) -> EngineInfo:
        """After the engine's death: another process. Raises as `start`."""
        await self.shutdown(0.0)
        self._death, self._info, self._processor, self._closing = None, None, None, False
        self.dead.clear()
        return await self.start(on_progress)

    def kill(self) -> None:
        """End the process at once, as if it had died."""
        if self._process is not None:
            self._process.kill()

    async def shutdown(self, grace: float = 5.0) -> None:
        """End the process: politely, and after `grace` seconds by force. Open streams raise `EngineDeadError`."""
        self._closing = True
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._writer is not None and not self._writer.is_closing():
            self._send(Shutdown())
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._reader_task is not None:
            await self._reader_task
        if self._writer is not None:
            self._writer.close()

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
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def is_ready(self) -> bool:
        return self._processor is not None and self.is_alive

    @property
    def is_alive(self) -> bool:
        return self._reader_task is not None and self._death is None and not self._closing

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
        return bool(self._streams or self._stats_waiters) and time.monotonic() - self.last_progress > timeout

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
        processor = self.processor
        self._check_alive()
        info = processor.variant(variant)
        _check_count(len(prompts), sampling.n, self.config.max_waiting)
        if not self._streams:
            self.last_progress = time.monotonic()  # an idle engine says nothing, that is not being stuck
        stream = stream or RequestStream(request_id, len(prompts), self.abort, sampling.n)
        submission = next(self._submissions)
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
                self._place_of[request_id] = info.place
            self._acknowledgements[submission] = accepted
            self._send(Add(submission, requests))
            await accepted
        except BaseException:
            if self._streams.get(request_id) is stream:
                stream.close()
            raise
        finally:
            self._acknowledgements.pop(submission, None)
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
        for accepted in self._acknowledgements.values():
            if not accepted.done():
                accepted.set_exception(error)
                accepted.exception()  # taken note of, even if nobody awaits it
        for stream in list(self._streams.values()):
            stream.fail(error)
            stream.close()

    async def stats(self, routing: bool = False) -> EngineStats:
        """Raises `EngineDeadError`. A busy engine answers between two steps. `routing`: see `GetStats`."""
        self._check_alive()
        if not self._streams and not self._stats_waiters:
            self.last_progress = time.monotonic()  # as in `submit`
        waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(waiter)
        self._send(GetStats(routing))
        return await waiter

    async def _beat(self) -> None:
        """An engine without work says nothing, and would seem healthy if it hung."""
        with contextlib.suppress(EngineDeadError):
            while True:
                await asyncio.sleep(self.heartbeat_every)
                if time.monotonic() - self.last_progress > self.heartbeat_every:
                    await self.stats()

    # --- variants that come and go

    async def add_variant(self, folder: str, addition: Addition) -> VariantInfo:
        """Load a version that a planner wrote; no name means it yet. Raises `ChangeRefusedError` where the engine
        cannot, and `EngineDeadError`; all is as before then. Cancelled, it is given up."""
        number, done = self._new_change()
        self._send(AddVariant(number, folder, addition))
        try:
            info = await asyncio.shield(done)
        except asyncio.CancelledError:
            self._send(CancelAdd(number))
            raise
        assert info is not None
        try:
            self.processor.add_version(info)
        except PolymoeError as error:
            self.processor.versions.drop(info)
            await self.drop_variant(info)
            raise ChangeRefusedError(str(error)) from error
        return info

    async def drop_variant(self, info: VariantInfo) -> None:
        """Free a version that no name means any more, when its last request has ended."""
        self.processor.drop_version(info)
        number, done = self._new_change()
        self._send(DropVariant(number, info.place))
        await asyncio.shield(done)

    def point(self, names: Mapping[str, VariantInfo]) -> None:
        """What `model` in requests means from now on."""
        versions = self.processor.versions
        versions.names = {name: info.place for name, info in names.items()}
        self._info = msgspec.structs.replace(self.info, variants=versions.named())

    def requests_of(self, info: VariantInfo) -> list[str]:
        """Ids of the requests that run on a version."""
        return [request_id for request_id, place in self._place_of.items() if place == info.place]

    def _new_change(self) -> "tuple[int, asyncio.Future[VariantInfo | None]]":
        self._check_alive()
        number = next(self._submissions)
        self._changes[number] = asyncio.get_running_loop().create_future()
        return number, self._changes[number]

    def _changed(self, number: int, info: VariantInfo | None, error: PolymoeError | None = None) -> None:
        change = self._changes.pop(number, None)
        if change is None or change.done():
            return
        if error is None:
            change.set_result(info)
        else:
            change.set_exception(error)
            change.exception()  # taken note of, even if nobody awaits it

    # --- the wire

    def _send(self, message: Message) -> None:
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        death: PolymoeError = EngineDeadError("The engine process ended unexpectedly.")
        try:
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                event = decode_event(await reader.readexactly(body_length(header)))
                self.last_progress = time.monotonic()
                if isinstance(event, Fatal):
                    death = PolymoeError(event.message) if event.deliberate else EngineDeadError(event.message)
                else:
                    self._handle(event)
        except (asyncio.IncompleteReadError, OSError):
            pass
        except EngineDeadError as error:
            death = error
        finally:
            self._die(death)

    def _handle(self, event: Event) -> None:
        match event:
            case Outputs(outputs):
                self._deliver(self.processor.process(outputs))
            case Accepted(submission):
                accepted = self._acknowledgements.get(submission)
                if accepted is not None and not accepted.done():
                    accepted.set_result(None)
            case Rejected():
                accepted = self._acknowledgements.get(event.submission)
                if accepted is not None and not accepted.done():
                    accepted.set_exception(event.error())
            case Stats(stats):
                waiter = self._stats_waiters.pop(0)  # answers come in the order of the questions
                if not waiter.done():
                    waiter.set_result(stats)
            case VariantAdded(change, info):
                self._changed(change, info)
            case VariantDropped(change):
                self._changed(change, None)
            case ChangeFailed(change, message):
                self._changed(change, None, ChangeRefusedError(message))
            case Progress(stage, fraction):
                if self._on_progress is not None:
                    self._on_progress(stage, fraction)
            case Ready(info):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)

    def _deliver(self, step: StepOutput) -> None:
        if step.aborts:
            self._send(Abort(step.aborts))
        for chunk in step.chunks:
            self._streams[chunk.request_id].push_chunk(chunk)
        for result in step.finished:
            self._streams[result.request_id].push_result(result)
        for request_id in {result.request_id for result in step.finished} - self.processor.open_requests:
            del self._streams[request_id]
            self._place_of.pop(request_id, None)

    def _die(self, death: PolymoeError) -> None:
        """Nothing more will come: whoever waits is told."""
        self._death = death
        if self._writer is not None:
            self._writer.close()
        waiters = [self._ready, *self._acknowledgements.values(), *self._stats_waiters, *self._changes.values()]
        for waiter in waiters:
            if waiter is not None and not waiter.done():
                waiter.set_exception(death)
                waiter.exception()  # taken note of, even if nobody awaits it
        self._stats_waiters.clear()
        if self._processor is not None:
            self.fail_all(EngineDeadError("The engine stopped; the request cannot finish."))
        if not self._closing:
            self.dead.set()

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDeadError("The engine has stopped.")


def start_process(module: str, fd: int) -> subprocess.Popen[bytes]:
    """A new Python that runs `module`, with the socket `fd`."""
    # -P: a module in the working directory must not stand in for one of ours.
    command = [sys.executable, "-P", "-m", module, "--fd", str(fd)]
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, env=environment)


def _check_count(prompts: int, n: int, limit: int) -> None:
    """Raises `RequestError` for more sequences than an empty queue holds: to try again would be in vain."""
    if prompts * n > limit:
        raise RequestError(
            f"The request asks for {prompts * n} sequences at once ({prompts} prompts, n = {n}) and this server queues "
            f"at most {limit}. Send fewer prompts in a request, or a smaller n.",
            param="prompt" if prompts > limit or n == 1 else "n",
        )
