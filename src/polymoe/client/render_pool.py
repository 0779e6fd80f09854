"""The process that renders chat templates, as seen from an event loop."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from polymoe.errors import OverloadedError, RequestError
from polymoe.text.chat_template import Message, TemplateSource
from polymoe.text.render_process import Done, Frames, Job, Render, Rendered, framed

_CHILDREN = 2
_SECONDS = 3.0  # of one rendering; ordinary ones take less than a thousandth
_BYTES = 256 << 20
_CHARACTERS = 16 << 20
_MOST_WAITING = 256  # jobs of all templates
_PATIENCE = 10.0  # seconds that a request waits for its turn and its text
_LAST_SECONDS = 1.0
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "TMPDIR")  # of the environment; never a key


class RenderPool:
    """Renders in other processes, with limits of time, memory and output. The first request starts them.

    All methods belong to one event loop.
    """

    def __init__(self, seconds: float = _SECONDS, size: int = _BYTES) -> None:
        self._limits = [f"--children={_CHILDREN}", f"--seconds={seconds}", f"--bytes={size}"]
        self._limits.append(f"--characters={_CHARACTERS}")
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Rendered]] = {}

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def check(self, source: TemplateSource) -> str | None:
        """What is wrong with a template that is no Jinja."""
        done = await self._ask(Render(source))
        return done.error if done.failed else None

    async def render(
        self, source: TemplateSource, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> str:
        """As `ChatTemplate.render`: the marked text. Raises `RequestError`, also for what takes too long or too much,
        and `OverloadedError` where too many wait."""
        done = await self._ask(Render(source, list(messages), None if variables is None else dict(variables)))
        if done.text is None:
            if done.failed:
                raise RequestError(
                    "The chat template of this variant cannot be used; use /v1/completions with a plain prompt.",
                    param="messages",
                )
            raise RequestError(done.error or "The chat template failed.", param=done.param)
        return done.text

    async def _ask(self, request: Render) -> Rendered:
        if len(self._waiting) >= _MOST_WAITING:
            raise OverloadedError("Too many chats wait to be rendered.", 1.0)
        number = next(self._numbers)
        answer: asyncio.Future[Rendered] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(_PATIENCE):
                process = await self._running()
                template = hashlib.blake2b(request.source.jinja.encode("utf-8", "replace"), digest_size=16).digest()
                self._send(process, Job(number, template, msgspec.msgpack.encode(request)))
                return await answer
        except TimeoutError as error:
            raise OverloadedError("The chat template of this variant is busy with other requests.", 2.0) from error
        finally:
            del self._waiting[number]
            if (answer.cancelled() or not answer.done()) and self._process is not None:  # nobody waits any more
                self._send(self._process, Job(number))

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "polymoe.text.render_process", *self._limits,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    env={name: os.environ[name] for name in _KEPT if name in os.environ},
                )  # fmt: skip
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    @staticmethod
    def _send(process: asyncio.subprocess.Process, job: Job) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):  # it has ended, and `_read` tells who waits
            process.stdin.write(framed(job))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        frames = Frames()
        while data := await process.stdout.read(1 << 20):
            for body in frames.feed(data):
                done = msgspec.msgpack.decode(body, type=Done)
                waiting = self._waiting.get(done.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(msgspec.msgpack.decode(done.rendered, type=Rendered))
        await process.wait()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(Rendered(error="Rendering the chat was interrupted; try again.", param="messages"))

    async def close(self) -> None:
        """End the process, and whatever it still renders."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # the keeper sees it and kills its children
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if self._reader is not None:
            await self._reader
