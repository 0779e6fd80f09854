"""What Ray adds: one server against one and two replicas of one core, on this machine.

    python benchmarks/ray_serving.py [--requests 64] [--in-flight 16] [--tokens 48]

A random family of a 110M-parameter Mixtral in bfloat16, two variants, prompts of 64 token ids, `--in-flight` requests
for each replica. The clients, Ray's own processes and the ingress share the cores with the engines: two servers without
Ray (`servers`) are what the machine has to give. CPU a streamed token is told for each kind of process, above what it
takes when nothing runs. First tokens (`first_token`, alone with `--only-first`) are those of the demo family, whose
engine takes little of the time, from a server and from a deployment in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from polymoe.bench.family import MANY_MIXTRAL
from polymoe.bench.written_family import write_variant
from polymoe.demo import family_paths
from polymoe.deploy.build import build_app
from polymoe.deploy.config import DeployConfig, Pool
from polymoe.deploy.installed import require_ray
from polymoe.deploy.run import start_serve
from polymoe.offline.api import make_plan
from polymoe.server.settings import ServerSettings

VARIANTS = ("base", "tuned")
KV = 128 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_bundle(folder: Path) -> Path:
    for index, name in enumerate(VARIANTS):
        write_variant(folder / name, index, {"model_type": "mixtral"} | MANY_MIXTRAL)
    make_plan({name: folder / name for name in VARIANTS}, "separate", None, folder / "bundle")
    return folder / "bundle"


class Load:
    """Requests to one server."""

    def __init__(self, url: str, tokens: int, seed: int = 0, variants: Sequence[str] = VARIANTS) -> None:
        self._url, self._tokens, self._random, self._variants = url, tokens, random.Random(seed), variants

    def _body(self, **more: Any) -> dict[str, Any]:
        prompt = [self._random.randrange(2, 256) for _ in range(64)]
        return {
            "model": self._random.choice(self._variants), "prompt": prompt, "max_tokens": self._tokens,
            "ignore_eos": True,
        } | more  # fmt: skip

    async def first_tokens(self, count: int) -> list[float]:
        """Seconds to the first token of streams, one after the other."""
        times = []
        async with httpx.AsyncClient(timeout=120) as client:
            for _ in range(count):
                began = time.perf_counter()
                body = self._body(stream=True, max_tokens=4)
                async with client.stream("POST", self._url + "/v1/completions", json=body) as response:
                    lines = response.aiter_lines()
                    async for line in lines:
                        if line.startswith("data: "):
                            times.append(time.perf_counter() - began)
                            break
                    async for _ in lines:
                        pass
        return times

    async def throughput(self, count: int, in_flight: int, stream: bool = False) -> float:
        """Tokens a second with so many requests in flight."""
        bodies = iter([self._body(stream=stream) for _ in range(count)])

        async def one(client: httpx.AsyncClient) -> None:
            for body in bodies:
                response = await client.post(self._url + "/v1/completions", json=body)
                response.raise_for_status()

        async with httpx.AsyncClient(timeout=120) as client:
            began = time.perf_counter()
            await asyncio.gather(*(one(client) for _ in range(in_flight)))
            return count * self._tokens / (time.perf_counter() - began)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(url + "/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError("the server does not become ready")


KINDS = {"polymoe.engine.process": "engines", ":ingress": "ingress", ":pool": "replicas"}


def cpu_by_kind() -> dict[str, float]:
    """CPU seconds so far of this process, which is the clients, and of its descendants."""
    total = dict.fromkeys(("clients", "engines", "ingress", "replicas", "ray"), 0.0)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        kind = next((kind for text, kind in KINDS.items() if text in line), "ray")
        total["clients" if process.pid == os.getpid() else kind] += times.user + times.system
    return total


@contextmanager
def running(bundle: Path, count: int) -> Iterator[list[str]]:
    """As many servers of one core; their URLs."""
    ports = [free_port() for _ in range(count)]
    servers = []
    for port in ports:
        command = [
            sys.executable, "-c", "from polymoe.cli.main import main; main()", "serve", str(bundle),
            "--port", str(port), "--threads", "1", "--kv-cache", str(KV), "--device", "cpu",
        ]  # fmt: skip
        servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    try:
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url in urls:
            wait_until_ready(url)
        yield urls
    finally:
        for server in servers:
            server.terminate()
            server.wait(30)


def alone(bundle: Path, count: int, options: argparse.Namespace) -> dict[str, float]:
    """As many servers of one core, each with its own clients."""
    with running(bundle, count) as urls:
        return measure([Load(url, options.tokens, seed) for seed, url in enumerate(urls)], options)


def side_by_side(folder: Path, port: int, options: argparse.Namespace) -> dict[str, float]:
    """First tokens of a server and of a deployment on `port`, in turns, so that both meet the same machine."""
    from ray import serve

    paths = family_paths()
    bundle = make_plan(paths, "separate", None, folder / "demo").path
    serve.run(build_app(config_of(bundle, 1, port)), name="bench", route_prefix=None)
    with running(bundle, 1) as (url,):
        urls = (url, f"http://127.0.0.1:{port}")
        loads = [Load(each, options.tokens, variants=list(paths)) for each in urls]

        async def turns() -> list[list[float]]:
            times: list[list[float]] = [[], []]
            for _ in range(options.first // 4):
                for load, found in zip(loads, times, strict=True):
                    found += await load.first_tokens(4)
            return times

        asyncio.run(turns())  # warm
        server, ray = asyncio.run(turns())
    found: dict[str, float] = {}
    for part, of in ((0.5, "p50"), (0.9, "p90")):
        one, other = (1000 * sorted(times)[int(part * len(times))] for times in (server, ray))
        found |= {f"{of}_server_ms": round(one, 2), f"{of}_ray_ms": round(other, 2)}
        found[f"{of}_added_ms"] = round(other - one, 2)
    return found


def measure(loads: list[Load], options: argparse.Namespace, replicas: int = 1) -> dict[str, float]:
    async def rate(count: int, in_flight: int) -> float:
        return sum(await asyncio.gather(*(load.throughput(count, in_flight) for load in loads)))

    asyncio.run(rate(8, 4))  # warm
    first = asyncio.run(loads[0].first_tokens(options.first))
    found = asyncio.run(rate(options.requests * replicas, options.in_flight * replicas))
    return {"p50_first_token_ms": round(1000 * statistics.median(first), 2), "tokens_per_second": round(found, 1)}


def with_ray(bundle: Path, replicas: int, port: int, options: argparse.Namespace) -> dict[str, Any]:
    from ray import serve

    config = config_of(bundle, replicas, port)
    serve.run(build_app(config), name="bench", route_prefix=None)
    load = Load(f"http://127.0.0.1:{port}", options.tokens)
    found: dict[str, Any] = measure([load], options, replicas)
    began, before = time.monotonic(), cpu_by_kind()
    time.sleep(3.0)
    idle = {kind: (seconds - before[kind]) / (time.monotonic() - began) for kind, seconds in cpu_by_kind().items()}
    count = options.requests // 2 * replicas
    began, before = time.monotonic(), cpu_by_kind()
    asyncio.run(load.throughput(count, options.in_flight * replicas, stream=True))
    took = time.monotonic() - began
    found["streamed_tokens_per_second"] = round(count * options.tokens / took, 1)
    found["cpu_ms_per_streamed_token"] = {
        kind: round(1000 * (seconds - before[kind] - idle[kind] * took) / (count * options.tokens), 3)
        for kind, seconds in cpu_by_kind().items()
    }
    found["idle_cpu_percent"] = {kind: round(100 * share, 1) for kind, share in idle.items()}
    return found


def config_of(bundle: Path, replicas: int, port: int) -> DeployConfig:
    engine = {"num_threads": 1, "kv_cache_bytes": KV, "device": "cpu"}
    pool = Pool(name="pool", sources=[str(bundle)], replicas=replicas, cpus=1.0, engine=engine)
    return DeployConfig(server=ServerSettings(port=port), pools=(pool,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("requests", 64), ("in-flight", 16), ("tokens", 48), ("first", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only-first", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require_ray()  # before Ray is imported
    import ray
    from ray import serve

    found: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder))
        if not options.only_first:
            found["server"], found["servers"] = (alone(bundle, count, options) for count in (1, 2))
            print(json.dumps(found), file=sys.stderr, flush=True)
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        try:
            port = free_port()
            start_serve(config_of(bundle, 1, port))
            for replicas in () if options.only_first else (1, 2):
                found[f"ray_{replicas}"] = with_ray(bundle, replicas, port, options)
                print(json.dumps(found), file=sys.stderr, flush=True)
            found["first_token"] = side_by_side(Path(folder), port, options)
            serve.shutdown()
        finally:
            ray.shutdown()
    if not options.only_first:
        one, two = found["ray_1"], found["ray_2"]
        found["two_over_one"] = round(two["tokens_per_second"] / one["tokens_per_second"], 3)
        found["two_servers_over_one"] = round(
            found["servers"]["tokens_per_second"] / found["server"]["tokens_per_second"], 3
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
