"""The connection to an engine, usually of a process of its own, and what is asked of it."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Protocol

from polymoe.bundle.live import Addition
from polymoe.client.pending import Pending
from polymoe.config import EngineConfig
from polymoe.errors import ChangeRefusedError, EngineDeadError, PolymoeError
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
from polymoe.protocol.request import EngineRequest, SequenceId, TokenOutput

_SECRETS = ("POLYMOE_API_KEY", "POLYMOE_ADMIN_KEY")  # variables that are none of the engine's business


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Engine(Protocol):
    """Where an engine runs."""

    pid: int | None  # of a process of this machine that is ours alone

    async def open(self) -> Streams:
        """The way to it; it has been told what to load. Raises `EngineDeadError` where nobody listens."""

    def kill(self) -> None:
        """End it at once, if it is ours."""

    async def wait(self, grace: float) -> None:
        """For its end, if it is ours; after `grace` seconds by force."""


class EngineProcess:
    """Starts a process that runs `module`."""

    def __init__(self, module: str, config: EngineConfig) -> None:
        self._config = config
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = start_process(module, theirs.fileno())
        self.pid: int | None = self._process.pid

    async def open(self) -> Streams:
        reader, writer = await asyncio.open_connection(sock=self._socket)
        writer.write(frame(Start(self._config)))
        return reader, writer

    def kill(self) -> None:
        self._process.kill()

    async def wait(self, grace: float) -> None:
        try:
            await asyncio.to_thread(self._process.wait, grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)


class Connection:
    """Talks to an engine, in one event loop.

    What is asked raises `PolymoeError` when the engine has ended.

    Args: `on_outputs`: given what each step produced; `on_progress`: (stage, fraction) while it loads; `on_end`: why
    nothing more will come; whoever waits is told that too.
    """

    def __init__(
        self,
        engine: Engine,
        on_outputs: Callable[[list[TokenOutput]], None],
        on_progress: Callable[[str, float], None] | None,
        on_end: Callable[[PolymoeError], None],
    ) -> None:
        self.engine = engine
        self.last_heard = time.monotonic()
        self._on_outputs, self._on_progress, self._on_end = on_outputs, on_progress, on_end
        self._starts: Pending[EngineInfo] = Pending()
        self._submissions: Pending[None] = Pending()
        self._questions: Pending[EngineStats] = Pending()
        self._additions: Pending[VariantInfo] = Pending()
        self._drops: Pending[None] = Pending()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits for `stats`."""
        return bool(self._questions)

    async def load(self) -> EngineInfo:
        """The first thing asked: the engine's, when it has loaded."""
        reader, self._writer = await self.engine.open()
        _, ready = self._starts.new()
        self._reading = asyncio.create_task(read_events(reader, self._handle, self._end))
        return await ready

    async def add(self, requests: list[EngineRequest]) -> None:
        """All of these or none. Raises `RequestError`."""
        submission, accepted = self._submissions.new()
        self.send(Add(submission, requests))
        await accepted

    def give_up_additions(self, error: PolymoeError) -> None:
        """Requests that are not accepted yet: who waits for that gets the error."""
        self._submissions.fail_all(error)

    def abort(self, request_ids: list[SequenceId]) -> None:
        self.send(Abort(request_ids))

    async def stats(self, routing: bool) -> EngineStats:
        """`routing`: see `GetStats`."""
        _, answer = self._questions.new()
        self.send(GetStats(routing))
        return await answer

    async def add_variant(self, folder: str, addition: Addition) -> VariantInfo:
        """Raises `ChangeRefusedError`; all is as before then. Cancelled, it is given up."""
        change, added = self._additions.new()
        self.send(AddVariant(change, folder, addition))
        try:
            return await asyncio.shield(added)
        except asyncio.CancelledError:
            self.send(CancelAdd(change))
            raise

    async def drop_variant(self, place: int) -> None:
        """Returns when the last request of this place has ended and it is free."""
        change, dropped = self._drops.new()
        self.send(DropVariant(change, place))
        await asyncio.shield(dropped)

    async def shutdown(self, grace: float) -> None:
        """End the engine: politely, and after `grace` seconds by force."""
        self.send(Shutdown())
        await self.engine.wait(grace)
        if self._reading is not None:
            await self._reading

    def send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    def _handle(self, event: Event) -> None:
        self.last_heard = time.monotonic()
        match event:
            case Outputs(outputs):
                self._on_outputs(outputs)
            case Accepted(submission):
                self._submissions.done(submission, None)
            case Rejected():
                self._submissions.fail(event.submission, event.error())
            case Stats(stats):
                self._questions.first_done(stats)
            case VariantAdded(change, info):
                self._additions.done(change, info)
            case ChangeFailed(change, message):
                self._additions.fail(change, ChangeRefusedError(message))
            case VariantDropped(change):
                self._drops.done(change, None)
            case Progress(stage, fraction):
                if self._on_progress is not None:
                    self._on_progress(stage, fraction)
            case Ready(info):
                self._starts.first_done(info)

    def _end(self, death: PolymoeError) -> None:
        if self._writer is not None:
            self._writer.close()
        for pending in (self._starts, self._submissions, self._questions, self._additions, self._drops):
            pending.fail_all(death)
        self._on_end(death)


async def read_events(
    reader: asyncio.StreamReader, handle: Callable[[Event], None], end: Callable[[PolymoeError], None]
) -> None:
    """All that an engine says, but for the reason of its end, until its end: `end` is told why."""
    death: PolymoeError = EngineDeadError("The engine process ended unexpectedly.")
    try:
        while True:
            header = await reader.readexactly(HEADER_BYTES)
            event = decode_event(await reader.readexactly(body_length(header)))
            if isinstance(event, Fatal):
                death = PolymoeError(event.message) if event.deliberate else EngineDeadError(event.message)
            else:
                handle(event)
    except (asyncio.IncompleteReadError, OSError):
        pass
    except EngineDeadError as error:
        death = error
    finally:
        end(death)


def start_process(module: str, fd: int) -> "subprocess.Popen[bytes]":
    """A new Python that runs `module`, with the socket `fd`."""
    # -P: a module in the working directory must not stand in for one of ours.
    command = [sys.executable, "-P", "-m", module, "--fd", str(fd)]
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, env=environment)
