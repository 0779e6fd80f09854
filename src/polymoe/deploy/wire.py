"""How an ingress and a replica speak: the messages of the engine's process (`protocol.messages`), framed alike, over a
connection of their own that Ray has no part in. Reading them never runs code.

    ingress -> replica   Hello, then Add, Abort, GetStats, AddVariant, DropVariant, CancelAdd, Point, Shutdown
    replica -> ingress   Ready, then Outputs (one a step for all requests of that ingress), Accepted, Rejected, Stats,
                         VariantAdded, VariantDropped, ChangeFailed
"""

import asyncio
import socket
from typing import Any

import msgspec

from polymoe.protocol.messages import HEADER_BYTES, Command, Message, body_length

MOST_HELLO_BYTES = 4096
# Seconds, and milliseconds for what was sent and is not acknowledged.
_KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}


class Hello(Message, frozen=True):
    """The first frame of a connection."""

    token: str


class Point(Message, frozen=True):
    """What names mean from now on, name -> version; for who connects later."""

    names: dict[str, str]


class Address(msgspec.Struct, frozen=True):
    """Where a replica is spoken to: by a socket's path on its own node, else by host and port."""

    path: str = ""
    host: str = ""
    port: int = 0
    token: str = ""


def notice_loss(writer: asyncio.StreamWriter) -> None:
    """End a TCP connection whose other machine says nothing for 10 seconds, which else is never noticed."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


_hello: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
_command: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Command | Point)


async def read_frame(reader: asyncio.StreamReader, most: int | None = None) -> bytes:
    """The body of one. Raises `asyncio.IncompleteReadError` or `OSError` at the connection's end, and
    `msgspec.DecodeError` for one of more than `most` bytes."""
    length = body_length(await reader.readexactly(HEADER_BYTES))
    if most is not None and length > most:
        raise msgspec.DecodeError(f"a first frame of {length} bytes")
    return await reader.readexactly(length)


def decode_hello(body: bytes) -> Hello:
    return _hello.decode(body)


def decode_peer_command(body: bytes) -> Command | Point:
    command: Command | Point = _command.decode(body)
    return command
