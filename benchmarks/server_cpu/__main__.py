"""The server's own CPU time for a streamed token, with an engine that computes nothing.

    python -m benchmarks.server_cpu [--streams 1,32,256,1000] [--api chat|completions] [--seconds 10] [--profile FILE]

N clients stream at once, each over a connection of its own; the engine gives each of them a token a step, and its steps
are so far apart that the server is not saturated. Of the server's process, user and system time count, the writing to
sockets included; the engine's process and the clients' do not. Ends with one line of JSON.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.server_cpu.null_engine import FOLDERS, STEP
from polymoe.demo import family_paths
from polymoe.machine import describe_machine

MOST_TOKENS = 4000  # a second, so that a busy machine keeps up
FASTEST_STEP = 0.01  # seconds
PORT = 8431
ROOT = Path(__file__).resolve().parents[2]


class Reader(asyncio.Protocol):
    """A client that counts events and throws them away."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.tokens = 0
        self.failed = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self.failed = data.decode(errors="replace")
        self.tokens += data.count(b"data: {")
        if b'"error"' in data:
            self.failed = data.decode(errors="replace")


def request(api: str, variant: str) -> bytes:
    body: dict[str, Any] = {"model": variant, "stream": True, "max_tokens": 100_000, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "Hello."}]} if api == "chat" else {"prompt": "Hello."}
    path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def start(step: float, profile: Path | None) -> subprocess.Popen[bytes]:
    folders = ":".join(f"{name}={path}" for name, path in family_paths().items())
    environment = {**os.environ, STEP: str(step), FOLDERS: folders}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "benchmarks.server_cpu.server", str(PORT), *([str(profile)] if profile else [])]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{PORT}/ready").raise_for_status()
            return server
        except httpx.HTTPError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)


def used(server: psutil.Process) -> float:
    """Seconds of CPU."""
    times = server.cpu_times()
    return float(times.user + times.system)


async def measure(server: psutil.Process, streams: int, api: str, seconds: float) -> dict[str, float]:
    loop, variants = asyncio.get_running_loop(), list(family_paths())
    spent, began = server.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds / 2)
    idle = (server.cpu_times().user + server.cpu_times().system - spent.user - spent.system) / (
        time.monotonic() - began
    )
    readers = [Reader(request(api, variants[k % len(variants)])) for k in range(streams)]
    transports = []
    for k, reader in enumerate(readers):
        transports.append((await loop.create_connection(lambda reader=reader: reader, "127.0.0.1", PORT))[0])  # type: ignore[misc]
        if k % 32 == 31:
            await asyncio.sleep(0.02)
    while any(reader.tokens < 3 and not reader.failed for reader in readers):
        await asyncio.sleep(0.1)
    tokens, before, began = sum(reader.tokens for reader in readers), used(server), time.monotonic()
    await asyncio.sleep(seconds)
    tokens, spent = sum(reader.tokens for reader in readers) - tokens, used(server) - before
    took = time.monotonic() - began
    for transport in transports:
        transport.close()
    failed = [reader.failed for reader in readers if reader.failed]
    assert not failed, f"{len(failed)} streams failed: {failed[0]}"
    return {
        "streams": streams,
        "tokens_per_second": round(tokens / took),
        "cpu_us_per_token": round(spent / tokens * 1e6, 1),
        "cores": round(spent / took, 3),
        "cores_idle": round(idle, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,32,256,1000")
    parser.add_argument("--api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--profile", type=Path, help="of the server with the last number of streams, for pstats")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.streams.split(",")]
    rows = []
    print(f"{'streams':>8} {'tokens/s':>9} {'µs/token':>9} {'cores':>6} {'cores idle':>11}")
    for streams in counts:
        profile = arguments.profile if streams == counts[-1] else None
        server = start(max(FASTEST_STEP, streams / MOST_TOKENS), profile)
        try:
            row = asyncio.run(measure(psutil.Process(server.pid), streams, arguments.api, arguments.seconds))
        finally:
            server.communicate(b"stop")
        rows.append(row)
        print("{:8.0f} {:9.0f} {:9.1f} {:6.3f} {:11.3f}".format(*row.values()), flush=True)
    print(json.dumps({"benchmark": "server_cpu", "api": arguments.api, "cpu": describe_machine()["cpu"], "rows": rows}))


if __name__ == "__main__":
    main()
