"""One TCP connection: what uvicorn leaves open about clients that are slow, silent, many or wrong.

|---- head ----|-------------- body --------------|---- answer ----|--- idle ---|
 header_timeout  body_timeout (in middleware.py)    write_timeout    keep_alive
"""

import asyncio
import json
import resource
import sys
from collections import OrderedDict
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from polymoe.server.errors import error_body
from polymoe.server.settings import ServerSettings

# Files beside connections: the listening socket, pipes to the engine and the renderer, libraries, files that are read.
_OTHER_FILES = 64
ACCEPTED_AT_ONCE = 32  # connections, before the first of them counts
_MOST_FILES = 1 << 16
_PROGRESS = 16 << 10  # bytes that a client reads at least in a write_timeout
_LINGER = 5.0  # seconds in which the rest of a refused body may still come


class ConnectionLimits:
    """What the connections of one server share."""

    def __init__(self, settings: ServerSettings) -> None:
        self.header_timeout, self.write_timeout = settings.header_timeout, settings.write_timeout
        self.most = max(1, min(settings.max_connections, raise_file_limit() - _OTHER_FILES - ACCEPTED_AT_ONCE))
        self.idle: OrderedDict[Connection, None] = OrderedDict()  # without a request, since longest first


def raise_file_limit() -> int:
    """Files that this process may open, as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


class PieceWriter:
    """Writes the pieces of an answer that is sent while it is made, past h11 and the middleware, which have nothing to
    say between its head and its end and would cost more than the rest of a token's way. In the scope's extensions."""

    EXTENSION = "polymoe.pieces"

    def __init__(self, connection: "Connection") -> None:
        self._transport, self._flow, self._cycle = connection.transport, connection.flow, connection.cycle
        self._is_chunked = connection.scope["http_version"] == "1.1"  # as h11 decides for an answer without a length

    @property
    def is_paused(self) -> bool:
        """The client reads more slowly than is written: `drain` first."""
        return self._flow.write_paused

    async def drain(self) -> None:
        await self._flow.drain()

    def write(self, piece: bytes) -> None:
        """Nothing happens where the client has gone."""
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece)


class Connection(H11Protocol):
    """uvicorn's, with limits. Beyond the largest number of connections the one that has idled longest makes room; where
    none idles, the new one is told to come later."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # --- the head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self._limits
        if len(self.connections) > limits.most:
            if not limits.idle:
                self._refuse(503, "The server has as many connections as it can hold.", "too_many_connections")
                return
            oldest, _ = limits.idle.popitem(last=False)
            oldest.give_up()
        limits.idle[self] = None
        self._await_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.transport.is_closing():
            self._watch_writing()
        elif self.cycle is not before:  # the head is complete
            self._limits.idle.pop(self, None)
            self._cancel_head()
            self._extend_scope()
        elif self._is_idle and self._head_timer is None:
            self._await_head()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_timeout, self.give_up)

    def _cancel_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # --- the answer

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()  # may start the next request, if it was sent ahead
        if self.transport.is_closing():
            self._watch_writing()
        elif self.cycle is before:
            self._limits.idle[self] = None
            if self.conn.trailing_data[0]:  # a part of the next head came with this request
                self._await_head()
            if self.conn.their_state is h11.SEND_BODY:
                self.loop.call_later(_LINGER, self._end_linger, before)
        else:
            self._extend_scope()

    def _extend_scope(self) -> None:
        """The application has not seen this request yet."""
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        extensions[PieceWriter.EXTENSION] = PieceWriter(self)

    def _end_linger(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.give_up()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing() and self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # --- the end

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._watch_writing()

    def _watch_writing(self) -> None:
        """What is still to be written must go out in time, or the connection ends without it."""
        if self._write_timer is None:
            left = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(self._limits.write_timeout, self._stalled, left)

    def _stalled(self, before: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() <= before - _PROGRESS:
            self._watch_writing()
        else:
            self.give_up()

    def give_up(self) -> None:
        """End it now, whatever is still to be written."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.idle.pop(self, None)
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    # --- errors

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an answer like all other errors, where one can still be sent."""
        del msg
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status, f"This is not a valid HTTP request: {str(error)[:200]}.", "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its answer has nowhere to go
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.give_up()
            return
        kind = "invalid_request_error" if status < 500 else "service_unavailable_error"
        body = json.dumps(error_body(message, kind, None, code)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES.get(status, b""))
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._watch_writing()
