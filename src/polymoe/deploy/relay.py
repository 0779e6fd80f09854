"""A replica's engine and the ingresses that use it: what they ask is passed on, and each gets its part of every step.

The relay holds no text and no tokenizers: it knows whose sequences are whose, and what the engine holds, which it tells
who connects.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from polymoe.client.connection import EngineProcess, read_events
from polymoe.config import EngineConfig
from polymoe.deploy.wire import (
    MOST_HELLO_BYTES,
    Address,
    Point,
    decode_hello,
    decode_peer_command,
    notice_loss,
    read_frame,
)
from polymoe.errors import EngineDeadError, PolymoeError, RequestError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.messages import (
    Abort,
    Accepted,
    Add,
    AddVariant,
    CancelAdd,
    ChangeFailed,
    Command,
    DropVariant,
    Event,
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
    frame,
)
from polymoe.protocol.request import SequenceId, TokenOutput

logger = logging.getLogger(__name__)

_HELLO_WITHIN = 5.0  # seconds
_FIRST_TOKENS_OF = 30.0  # seconds that count for `first_token`
_MOST_UNREAD = 64 << 20  # bytes that an ingress may leave unread before it counts as lost


@dataclass(eq=False)
class _Peer:
    """One ingress."""

    writer: asyncio.StreamWriter
    sequences: set[SequenceId] = field(default_factory=set)

    def send(self, message: Message) -> None:
        if not self.writer.is_closing():
            self.writer.write(frame(message))
            if self.writer.transport.get_write_buffer_size() > _MOST_UNREAD:
                logger.warning("An ingress does not read; its connection is ended.")
                self.writer.transport.abort()


@dataclass(frozen=True)
class _Asked:
    """A command that is answered by its number."""

    peer: _Peer
    number: int  # the peer's own
    sequences: tuple[SequenceId, ...] = ()


class Relay:
    """One engine's process, for any number of ingresses. All methods belong to one event loop.

    Args: `module`: what the process runs.
    """

    def __init__(self, config: EngineConfig, module: str = "polymoe.engine.process") -> None:
        self.config, self.module = config, module
        self.dead = asyncio.Event()  # set when the engine has ended
        self.token = secrets.token_hex(32)
        self._process: EngineProcess | None = None
        self._engine: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._info: EngineInfo | None = None
        self._death: PolymoeError | None = None
        self._folder: str | None = None
        self._servers: dict[str, tuple[asyncio.Server, Address]] = {}  # kind -> a listening socket
        self._peers: set[_Peer] = set()
        self._owners: dict[SequenceId, _Peer] = {}
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._questions: deque[_Peer | asyncio.Future[EngineStats]] = deque()  # answered in their order
        self._last_heard = time.monotonic()
        self._begun: dict[SequenceId, float] = {}  # that have no token yet -> since when
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=4096)  # (when, seconds it took)

    # --- life

    async def start(self) -> EngineInfo:
        """Have an engine that has loaded. Raises `PolymoeError` when it cannot."""
        self._process = EngineProcess(self.module, self.config)
        reader, self._engine = await self._process.open()
        self._ready = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(read_events(reader, self._pass_on, self._die))
        self._info = await self._ready
        return self._info

    async def listen(self, host: str | None = None) -> Address:
        """Be reachable: on this machine by a socket in a folder that is this user's alone, or at an address of it."""
        kind = host or ""
        if kind not in self._servers:
            if host is None:
                self._folder = tempfile.mkdtemp(prefix="polymoe-")  # for this user only
                path = str(Path(self._folder) / "engine")
                server = await asyncio.start_unix_server(self._serve, path)
                address = Address(path=path, token=self.token)
            else:
                server = await asyncio.start_server(self._serve, host, 0)
                address = Address(host=host, port=server.sockets[0].getsockname()[1], token=self.token)
            self._servers[kind] = server, address
        return self._servers[kind][1]

    async def close(self, grace: float = 5.0) -> None:
        """End the engine, and every connection."""
        for server, _ in self._servers.values():
            server.close()
        self._send(Shutdown())
        if self._process is not None:
            await self._process.wait(grace)
        if self._reading is not None:
            await self._reading
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def info(self) -> EngineInfo:
        """What the engine holds now, and what names mean."""
        if self._info is None:
            raise self._death or EngineDeadError("The engine has not started.")
        return self._info

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def num_sequences(self) -> int:
        """Those that somebody waits for."""
        return len(self._owners)

    def first_token(self) -> float:
        """Seconds within which nine of ten requests had their first token lately, or have waited for it; 0: none."""
        now = time.monotonic()
        while self._first_tokens and now - self._first_tokens[0][0] > _FIRST_TOKENS_OF:
            self._first_tokens.popleft()
        times = sorted([*(took for _, took in self._first_tokens), *(now - begun for begun in self._begun.values())])
        return times[min(len(times) - 1, int(0.9 * len(times)))] if times else 0.0

    def is_stuck(self, timeout: float) -> bool:
        """Whether there is work, or a question, but nothing was heard for `timeout` seconds."""
        return bool(self._owners or self._questions) and time.monotonic() - self._last_heard > timeout

    async def stats(self) -> EngineStats:
        """Raises `EngineDeadError`."""
        waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._ask(waiter, GetStats())
        return await waiter

    # --- ingresses

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(writer)
        notice_loss(writer)
        try:
            async with asyncio.timeout(_HELLO_WITHIN):
                hello = decode_hello(await read_frame(reader, MOST_HELLO_BYTES))
            if not hmac.compare_digest(hello.token.encode(), self.token.encode()):
                return
            peer.send(Ready(self.info))
            self._peers.add(peer)
            while True:
                command = decode_peer_command(await read_frame(reader))
                if isinstance(command, Shutdown | Start):
                    return
                self._obey(peer, command)
        except (asyncio.IncompleteReadError, OSError, TimeoutError, EngineDeadError):
            pass
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            logger.warning("What connected is no ingress: %s", error)
        finally:
            self._lose(peer)

    def _lose(self, peer: _Peer) -> None:
        """Nobody waits for its requests any more."""
        self._peers.discard(peer)
        for number, asked in list(self._asked.items()):
            if asked.peer is peer and asked.sequences:
                del self._asked[number]
        gone = list(peer.sequences)
        for sequence in gone:
            self._forget(sequence)
        if gone:
            self._send(Abort(gone))
        peer.writer.close()

    def _obey(self, peer: _Peer, command: Command | Point) -> None:
        match command:
            case Add(submission, requests):
                number, now = next(self._numbers), time.monotonic()  # clocks of machines differ
                ids = tuple(request.request_id for request in requests)
                if not self._owners.keys().isdisjoint(ids):  # of another ingress: each checks its own
                    in_use = RequestError(f"The request id {ids[0].request!r} is in use.", param="request_id")
                    peer.send(Rejected.of(submission, in_use))
                    return
                self._asked[number] = _Asked(peer, submission, ids)
                if not self._owners:
                    self._last_heard = now  # an idle engine says nothing, that is not being stuck
                peer.sequences.update(ids)
                self._owners.update(dict.fromkeys(ids, peer))
                self._begun.update(dict.fromkeys(ids, now))
                requests = [msgspec.structs.replace(request, arrival_time=now) for request in requests]
                self._send(Add(number, requests))
            case Abort(request_ids):
                mine = [sequence for sequence in request_ids if self._owners.get(sequence) is peer]
                for sequence in mine:
                    self._forget(sequence)
                self._send(Abort(mine))
            case GetStats():
                self._ask(peer, command)
            case AddVariant(change, folder, addition):
                self._send(AddVariant(self._number(peer, change), folder, addition))
            case DropVariant(change, place):
                self._send(DropVariant(self._number(peer, change), place))
            case CancelAdd(change):
                for number, asked in self._asked.items():
                    if asked.peer is peer and asked.number == change and not asked.sequences:
                        self._send(CancelAdd(number))
            case Point(names):
                self._point(names)

    def _number(self, peer: _Peer, change: int) -> int:
        number = next(self._numbers)
        self._asked[number] = _Asked(peer, change)
        return number

    def _ask(self, who: _Peer | asyncio.Future[EngineStats], question: GetStats) -> None:
        if self._death is not None or self._engine is None:
            raise EngineDeadError("The engine has stopped.")
        if not self._owners and not self._questions:
            self._last_heard = time.monotonic()
        self._questions.append(who)
        self._send(question)

    def _send(self, command: Message) -> None:
        if self._engine is not None and not self._engine.is_closing():
            self._engine.write(frame(command))

    def _forget(self, sequence: SequenceId) -> None:
        self._begun.pop(sequence, None)
        peer = self._owners.pop(sequence, None)
        if peer is not None:
            peer.sequences.discard(sequence)

    # --- the engine

    def _pass_on(self, event: Event) -> None:
        self._last_heard = time.monotonic()
        match event:
            case Outputs(outputs):
                self._share(outputs)
            case Accepted(submission):
                if (asked := self._asked.pop(submission, None)) is not None:
                    asked.peer.send(Accepted(asked.number))
            case Rejected():
                if (asked := self._asked.pop(event.submission, None)) is not None:
                    for sequence in asked.sequences:
                        self._forget(sequence)
                    asked.peer.send(msgspec.structs.replace(event, submission=asked.number))
            case Stats(stats):
                who = self._questions.popleft()
                if isinstance(who, _Peer):
                    who.send(event)
                elif not who.done():
                    who.set_result(stats)
            case VariantAdded(change, info):
                self._hold(info)
                if (asked := self._asked.pop(change, None)) is not None:
                    asked.peer.send(VariantAdded(asked.number, info))
            case VariantDropped(change, place):
                self._hold(None, place)
                if (asked := self._asked.pop(change, None)) is not None:
                    asked.peer.send(VariantDropped(asked.number, place))
            case ChangeFailed(change, message):
                if (asked := self._asked.pop(change, None)) is not None:
                    asked.peer.send(ChangeFailed(asked.number, message))
            case Ready(info):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
            case Progress():
                pass

    def _share(self, outputs: list[TokenOutput]) -> None:
        """One message to each ingress that has a part in this step; an empty one is a sign of life for all."""
        parts: dict[_Peer, list[TokenOutput]] = {} if outputs else {peer: [] for peer in self._peers if peer.sequences}
        for output in outputs:
            peer = self._owners.get(output.request_id)
            if peer is not None:
                parts.setdefault(peer, []).append(output)
                if (begun := self._begun.pop(output.request_id, None)) is not None:
                    self._first_tokens.append((self._last_heard, self._last_heard - begun))
                if output.finish_reason is not None:
                    self._forget(output.request_id)
        for peer, part in parts.items():
            peer.send(Outputs(part))

    def _hold(self, added: VariantInfo | None, dropped: int | None = None) -> None:
        """The engine holds one version more, or less."""
        info = self.info
        names = dict(info.names) or {variant.name: variant.place for variant in info.variants}
        variants = [v for v in info.variants if v.place != dropped and (added is None or v.place != added.place)]
        variants += [] if added is None else [added]
        names = {name: place for name, place in names.items() if place != dropped}
        self._info = msgspec.structs.replace(info, variants=variants, names=names)

    def _point(self, names: dict[str, str]) -> None:
        places = {variant.version: variant.place for variant in self.info.variants}
        meant = {name: places[version] for name, version in names.items() if version in places}
        self._info = msgspec.structs.replace(self.info, names=meant)

    def _die(self, death: PolymoeError) -> None:
        self._death = death
        if self._engine is not None:
            self._engine.close()
        waiters = [self._ready, *(who for who in self._questions if isinstance(who, asyncio.Future))]
        for waiter in waiters:
            if waiter is not None and not waiter.done():
                waiter.set_exception(death)
                waiter.exception()  # taken note of, even if nobody awaits it
        self._questions.clear()
        for peer in list(self._peers):
            peer.writer.close()
        self.dead.set()


async def drain(relay: Relay, grace: float, idle: float = 0.5) -> None:
    """Wait until nobody waits for anything, and nothing has come for `idle` seconds; at most `grace` seconds."""
    deadline, since = time.monotonic() + grace, time.monotonic()
    while time.monotonic() < deadline and not relay.dead.is_set():
        if relay.num_sequences:
            since = time.monotonic()
        elif time.monotonic() - since >= idle:
            return
        await asyncio.sleep(0.05)
