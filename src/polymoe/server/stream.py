"""Sending an answer: as server-sent events while it is made, or whole. In both cases a client that goes away ends its
requests in the engine."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polymoe.client.output_sequence import NOTHING_ALLOWED, CompletionChunk
from polymoe.client.request_stream import RequestStream
from polymoe.errors import NoProbabilitiesError, NothingAllowedError, PolymoeError, RequestError
from polymoe.protocol.request import CompletionOutput
from polymoe.server.connection import PieceWriter
from polymoe.server.errors import error_response
from polymoe.server.format import Format, encode_json
from polymoe.server.request_timer import RequestTimer

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ClientGoneError(RequestError):
    """The client left before there was anything to answer; nobody reads this."""

    status = 499


class JsonResponse(Response):
    """A JSON body, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return encode_json(content)


class EventStream(Response):
    """The events of a format. An error in mid-stream is one more event.

    It owns the request stream, and closes it whatever happens: the client leaves, sending fails, the server stops.
    (Starlette's StreamingResponse would not if the client left before the first chunk was asked for.)
    """

    media_type = "text/event-stream"

    def __init__(self, stream: RequestStream, form: Format, timer: RequestTimer) -> None:
        self.status_code = 200
        self.background = None
        self._stream = stream
        self._form = form
        self._timer = timer
        self._error: str | None = None
        self._writer: PieceWriter | None = None  # None: another server than ours runs the application
        # Proxies must not collect events, and nobody may keep them.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._writer = scope.get("extensions", {}).get(PieceWriter.EXTENSION)
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stream.close()
            self._timer.close(self._error)
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._writer is not None and self._stream.num_sequences == 1:  # of several the chunks of a step go together
            self._stream.sink = self._write_chunk
        async for event in self._events():
            if self._writer is None:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                continue
            if self._writer.is_paused:
                await self._writer.drain()
            self._writer.write(event)
        self._stream.sink = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _write_chunk(self, chunk: CompletionChunk) -> bool:
        """At once, where nothing has to wait: no task is woken for a token."""
        if self._writer is None or self._writer.is_paused or chunk.finish_reason is not None:
            return False
        self._timer.observe((chunk,))
        if event := self._form.encoded(chunk):
            self._writer.write(event)
        return True

    async def _events(self) -> AsyncIterator[bytes]:
        form = self._form
        try:
            if opening := form.opening():
                yield b"".join(map(form.event, opening))
            async for chunks in self._stream:
                self._timer.observe(chunks)
                if event := b"".join(map(form.encoded, chunks)):
                    yield event
                _check(chunks, form.model)
            if closing := form.closing():
                yield b"".join(map(form.event, closing))
        except Exception as error:
            if not isinstance(error, PolymoeError):
                logger.exception("A stream failed.")
            self._error = type(error).__name__ + f": {error}"
            body = json.loads(bytes(error_response(error).body))
            yield b"".join(map(form.event, form.failed(body)))
        if form.end:
            yield form.end


async def collect(request: Request, stream: RequestStream, form: Format, timer: RequestTimer) -> Response:
    """The whole answer. When the client disconnects the requests are aborted, and nobody reads the response."""

    stream.restartable = True

    async def run() -> None:
        async for chunks in stream:
            timer.observe(chunks)
            for chunk in chunks:
                form.read(chunk)

    runner = asyncio.create_task(run())
    watcher = asyncio.create_task(disconnected(request.receive))
    failure: str | None = None
    try:
        await asyncio.wait({runner, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not runner.done():
            return Response(status_code=499)
        runner.result()
        _check([output for result in stream.results.values() for output in result.outputs], form.model)
        return JsonResponse(form.whole(stream.results))
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        stream.close()
        timer.close(failure)
        for task in (runner, watcher):
            task.cancel()
        await asyncio.gather(runner, watcher, return_exceptions=True)


def _check(pieces: Sequence[CompletionChunk | CompletionOutput], model: str) -> None:
    """Raises what is to be told of a sequence that could not go on."""
    for piece in pieces:
        if piece.finish_reason == "error":
            raise NothingAllowedError if piece.stop_reason == NOTHING_ALLOWED else NoProbabilitiesError(model)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client disconnects. Raises `ClientGoneError` then."""
    runner = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({runner, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not runner.done():
            raise ClientGoneError("The client has gone.")
        return runner.result()
    finally:
        for task in (runner, watcher):
            task.cancel()
        await asyncio.gather(runner, watcher, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
