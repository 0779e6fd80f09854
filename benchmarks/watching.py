"""What open dashboards cost the engine: batches of requests on the demo family, in turns with and without pages that
read the live events.

    python benchmarks/watching.py [--pages 20] [--requests 32] [--tokens 256] [--rounds 6]

A page is a connection that reads `/ui/events` to the end; browsers, which draw, are on other machines. Beside the wall
clock the processor time of the engine's process is compared, which other work on the machine hardly changes. Ends with
one line of JSON.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from polymoe.demo import family_paths
from polymoe.offline.api import make_plan

_SERVE = "from polymoe.cli.main import main; main()"
_READ = """
import selectors, socket, sys
port, pages = int(sys.argv[1]), int(sys.argv[2])
waiting = selectors.DefaultSelector()
for _ in range(pages):
    page = socket.create_connection(("127.0.0.1", port))
    page.sendall(b"GET /ui/events HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    waiting.register(page, selectors.EVENT_READ)
while True:
    for key, _ in waiting.select():
        if not key.fileobj.recv(1 << 20):
            sys.exit("the server has closed a page")
"""


class Server:
    def __init__(self, bundle: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        command = ["serve", str(bundle), "--port", str(self.port), "--threads", "1", "--device", "cpu"]
        self.process = subprocess.Popen([sys.executable, "-c", _SERVE, *command], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{self.port}"
        while True:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.2)
        children = psutil.Process(self.process.pid).children()
        (self.engine,) = (child for child in children if "polymoe.engine.process" in child.cmdline())

    def batch(self, requests: int, tokens: int, names: list[str]) -> tuple[float, float]:
        """(tokens a second, the engine's processor time for a thousand of them)."""

        def ask(number: int) -> int:
            body: dict[str, Any] = {"model": names[number % len(names)], "prompt": f"Question {number}: what is it?"}
            body |= {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": number}
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=300).json()
            done: int = answer["usage"]["completion_tokens"]
            return done

        before, started = self._engine_seconds(), time.perf_counter()
        with ThreadPoolExecutor(requests) as pool:
            total = sum(pool.map(ask, range(requests)))
        wall, used = time.perf_counter() - started, self._engine_seconds() - before
        assert total == requests * tokens
        return total / wall, used / total * 1000

    def _engine_seconds(self) -> float:
        times = self.engine.cpu_times()
        return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("pages", 20), ("requests", 32), ("tokens", 256), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    names = list(family_paths())
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_plan(family_paths(), "separate", None, Path(folder) / "bundle").path
        server = Server(bundle)
        try:
            server.batch(given.requests, given.tokens, names)  # kernels, caches
            for round_ in range(given.rounds):
                for watched in (round_ % 2 == 0, round_ % 2 == 1):  # each of the two is the first one as often
                    readers: subprocess.Popen[bytes] | None = None
                    if watched:
                        command = [sys.executable, "-c", _READ, str(server.port), str(given.pages)]
                        readers = subprocess.Popen(command)
                        time.sleep(1.5)  # what they are sent first
                    found[watched].append(server.batch(given.requests, given.tokens, names))
                    if readers is not None:
                        assert readers.poll() is None, "the pages were closed"
                        readers.kill()
                        readers.wait()
        finally:
            server.process.terminate()
            server.process.wait()
    rate, used = ({watched: [one[i] for one in batches] for watched, batches in found.items()} for i in (0, 1))
    result = {
        "pages": given.pages,
        "cores": len(os.sched_getaffinity(0)),
        "tokens_a_second": {"without": [round(x) for x in rate[False]], "with": [round(x) for x in rate[True]]},
        "median_rate_with_to_without": round(median(rate[True]) / median(rate[False]), 4),
        "engine_seconds_a_1000_tokens": {
            "without": round(median(used[False]), 4), "with": round(median(used[True]), 4)
        },
        "engine_seconds_with_to_without": round(median(used[True]) / median(used[False]), 4),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
