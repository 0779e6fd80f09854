"""A process that renders chat templates for a server, and can be killed.

    python -m polymoe.text.render_process --children N --seconds S --bytes B --characters C

A template is a program that came with a checkpoint: it may loop for ever or ask for all memory. This process, the
keeper, loads what rendering needs once and forks children that render, one request at a time each, under limits of the
system. It kills a child that takes too long and forks another, which takes milliseconds.

    server  --frames on stdin-->  keeper  --socket pair-->  child
            <--frames on stdout--         <--------------

The keeper never runs a template, and a template runs in one child at a time: with two children, a bad one delays those
that share it, and nobody else. It ends when stdin does.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec

from polymoe.errors import BundleError, RequestError
from polymoe.text.chat_template import ChatTemplate, TemplateSource

_LENGTH = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CACHED_TEMPLATES = 64  # compiled ones, a child


_TOO_LARGE = "The chat template needs too much memory for these messages, or writes too much."
_TOO_LONG = "The chat template takes too long to render these messages."
_ENDED = "The chat template ended the process that rendered these messages."


class Render(msgspec.Struct, frozen=True):
    """Render `messages` with this template. None: only see whether it is Jinja."""

    source: TemplateSource
    messages: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None


class Rendered(msgspec.Struct, frozen=True):
    """The marked text, or why there is none; `param`: the field of the request that is to blame."""

    text: str | None = None
    error: str | None = None
    param: str | None = None
    failed: bool = False  # the template itself, not these messages


class Job(msgspec.Struct, frozen=True):
    """Of the server. `template` tells templates apart; an empty `render` takes a job back."""

    number: int
    template: bytes = b""
    render: bytes = b""


class Done(msgspec.Struct, frozen=True):
    number: int
    rendered: bytes


def framed(message: msgspec.Struct) -> bytes:
    """A 4-byte length and the message."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Bytes as they come -> whole bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if end > len(self._buffer):
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body


def render(request: Render, most_characters: int) -> Rendered:
    """In a child. What the system's limits forbid is an answer too."""
    try:
        template = _template(request.source)
        if request.messages is None:
            return Rendered("")
        text = template.render(request.messages, request.variables)
    except BundleError as error:
        return Rendered(error=str(error), failed=True)
    except RequestError as error:
        if isinstance(error.__cause__, MemoryError):
            return Rendered(error=_TOO_LARGE, param="messages")
        return Rendered(error=str(error), param=error.param)
    except MemoryError:
        return Rendered(error=_TOO_LARGE, param="messages")
    except RecursionError:
        return Rendered(error="The chat template nests too deeply.", param="messages")
    return Rendered(text) if len(text) <= most_characters else Rendered(error=_TOO_LARGE, param="messages")


@lru_cache(_CACHED_TEMPLATES)
def _cached(jinja: str, rest: bytes) -> ChatTemplate:
    return ChatTemplate(msgspec.structs.replace(msgspec.msgpack.decode(rest, type=TemplateSource), jinja=jinja))


def _template(source: TemplateSource) -> ChatTemplate:
    return _cached(source.jinja, msgspec.msgpack.encode(msgspec.structs.replace(source, jinja="")))


class Child:
    """A process that renders what it is sent. `job` is what it works at, `deadline` when it has to be done."""

    def __init__(self, limits: argparse.Namespace, others: list["Child"]) -> None:
        self.sock, theirs = socket.socketpair()
        self.job: Job | None = None
        self.deadline = 0.0
        self._frames = Frames()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for sock in (self.sock, *(other.sock for other in others)):
                    sock.close()
                _work(theirs, limits)
            finally:
                os._exit(1)
        theirs.close()

    def fileno(self) -> int:
        return self.sock.fileno()

    def begin(self, job: Job, seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it has died; `answer` will see
            self.sock.sendall(_LENGTH.pack(len(job.render)) + job.render)

    def answer(self) -> bytes | None:
        """The body of an answer that is complete, None for a part of one. Raises `EOFError` when the child ended."""
        try:
            data = self.sock.recv(1 << 20)
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return next(self._frames.feed(data), None)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.sock.close()


def _work(sock: socket.socket, limits: argparse.Namespace) -> None:
    """The life of a child: it writes no file, starts nothing and takes no more memory than it may."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed keeper leaves nothing behind
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.bytes,) * 2)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))
    frames = Frames()
    while data := sock.recv(1 << 20):
        for body in frames.feed(data):
            sock.sendall(framed(render(msgspec.msgpack.decode(body, type=Render), limits.characters)))


class Keeper:
    """Gives jobs to children, a template's one after the other, those of several templates in turn."""

    def __init__(self, limits: argparse.Namespace) -> None:
        self._limits = limits
        self._children: list[Child] = []
        self._waiting: OrderedDict[bytes, deque[Job]] = OrderedDict()
        while len(self._children) < limits.children:
            self._children.append(Child(limits, self._children))

    def run(self) -> None:
        """Until stdin ends."""
        frames = Frames()
        while True:
            busy = [child for child in self._children if child.job is not None]
            soonest = min((child.deadline for child in busy), default=None)
            wait = None if soonest is None else max(0.0, soonest - time.monotonic())
            watched: list[Child | int] = [0, *busy]
            readable, _, _ = select.select(watched, [], [], wait)
            for child in busy:
                if child in readable:
                    self._hear(child)
                elif time.monotonic() >= child.deadline:
                    self._replace(child, _TOO_LONG)
            if 0 in readable:
                data = os.read(0, 1 << 20)
                if not data:
                    break
                for body in frames.feed(data):
                    self._take(msgspec.msgpack.decode(body, type=Job))
            self._begin()
        for child in self._children:
            child.kill()

    def _take(self, job: Job) -> None:
        if job.render:
            self._waiting.setdefault(job.template, deque()).append(job)
            return
        for queue in self._waiting.values():
            for waiting in [waiting for waiting in queue if waiting.number == job.number]:
                queue.remove(waiting)
        for child in self._children:
            if child.job is not None and child.job.number == job.number:
                self._replace(child, _ENDED)
                break

    def _begin(self) -> None:
        for child in [child for child in self._children if child.job is None]:
            running = {other.job.template for other in self._children if other.job is not None}
            template = next((name for name in self._waiting if name not in running), None)
            if template is None:
                return
            queue = self._waiting.pop(template)
            if queue:
                child.begin(queue.popleft(), self._limits.seconds)
            if queue:
                self._waiting[template] = queue  # behind the others

    def _hear(self, child: Child) -> None:
        try:
            body = child.answer()
        except EOFError:
            self._replace(child, _ENDED)
            return
        if body is not None and child.job is not None:
            job, child.job = child.job, None
            _reply(Done(job.number, body))

    def _replace(self, child: Child, why: str) -> None:
        child.kill()
        self._children.remove(child)
        self._children.append(Child(self._limits, self._children))
        if child.job is not None:
            _reply(Done(child.job.number, msgspec.msgpack.encode(Rendered(error=why, param="messages"))))


def _reply(done: Done) -> None:
    data = memoryview(framed(done))
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="polymoe.text.render_process")
    parser.add_argument("--children", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of one rendering")
    parser.add_argument("--bytes", type=int, required=True, help="of memory, beyond what a child starts with")
    parser.add_argument("--characters", type=int, required=True, help="of a rendered text")
    limits = parser.parse_args()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the server, which closes stdin
        signal.signal(ignored, signal.SIG_IGN)
    # Before the children exist, so that each of them has the modules and the time zone that templates ask for.
    warm = TemplateSource("{{ messages[0].content | tojson }}{{ strftime_now('%d') }}{{ messages | length | string }}")
    render(Render(warm, [{"role": "user", "content": "a"}]), 1000)
    with contextlib.suppress(BrokenPipeError):
        Keeper(limits).run()


if __name__ == "__main__":
    main()
