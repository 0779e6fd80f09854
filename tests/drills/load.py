"""Many clients at once, cheap enough that a thousand of them fit beside a server."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from process_server import ProcessServer

_LINE = 1 << 24  # bytes of the longest event
LIMIT = 200.0  # seconds: who waits longer hangs


@dataclass
class Answer:
    """What a client got of a stream."""

    status: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)  # of each event, seconds since the request was sent
    error: str = ""  # code of an event that is an error
    finish: str | None = None
    done: bool = False  # [DONE] came

    @property
    def longest_gap(self) -> float:
        return max((b - a for a, b in zip([0.0, *self.times], self.times, strict=False)), default=0.0)


def http(path: str, body: object, key: str = "none") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


async def stream(port: int, body: dict[str, Any], leave_after: int | None = None, key: str = "none") -> Answer:
    """Read a stream of completions to its end, or leave after so many events."""
    answer, began = Answer(), time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LINE)
    try:
        async with asyncio.timeout(LIMIT):
            writer.write(http("/v1/completions", {**body, "stream": True}, key))
            while line := await reader.readline():
                _read(answer, line, time.monotonic() - began)
                if leave_after is not None and len(answer.times) >= leave_after:
                    writer.transport.abort()
                    break
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return answer


def _read(answer: Answer, line: bytes, now: float) -> None:
    if line.startswith(b"HTTP/1.1 "):
        answer.status = int(line[9:12])
    elif line.startswith(b"data: [DONE]"):
        answer.done = True
    elif line.startswith(b"data: "):
        answer.times.append(now)
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = event["error"]["code"]
        for choice in event.get("choices", ()):
            answer.text += choice["text"]
            answer.finish = choice["finish_reason"] or answer.finish


async def streams(port: int, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """All at once, but for the moment that it takes to connect."""
    tasks = []
    async with asyncio.TaskGroup() as group:
        for k, body in enumerate(bodies):
            tasks.append(group.create_task(stream(port, body)))
            if k % 50 == 49:
                await asyncio.sleep(0.02)
    return [task.result() for task in tasks]


@contextlib.asynccontextmanager
async def neighbour(server: ProcessServer, most_tokens: int) -> AsyncIterator[list[Answer]]:
    """A stream that goes on meanwhile, again and again; its answers are there at the end."""
    answers: list[Answer] = []
    stop = asyncio.Event()
    body = {"model": "base", "prompt": "the fox", "max_tokens": most_tokens, "temperature": 0, "ignore_eos": True}

    async def run() -> None:
        while not stop.is_set():
            answers.append(await stream(server.port, body))

    task = asyncio.create_task(run())
    try:
        await asyncio.sleep(0.3)
        yield answers
    finally:
        stop.set()
        await task
    assert all(answer.done and not answer.error for answer in answers), answers
    assert len({answer.text for answer in answers}) == 1, "a neighbour changed an answer"


async def post(server: ProcessServer, path: str, body: object) -> tuple[int, str]:
    """(status, body). A client of httpx takes milliseconds to make, in which this loop would read no stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(LIMIT):
        writer.write(http(path, body))
        answer = await reader.read()
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), rest.decode()


def memory(server: ProcessServer) -> dict[str, float]:
    """MiB that each process of the server holds."""
    return {name: process.memory_info().rss / (1 << 20) for name, process in server.tree().items()}


def say(drill: str, **figures: object) -> None:
    """What docs/operations.md shows; `pytest -s` prints it."""
    shown = (f"{name} {round(value, 2) if isinstance(value, float) else value}" for name, value in figures.items())
    print(f"\n{drill}: " + ", ".join(shown))
