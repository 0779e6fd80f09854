"""What Ray adds: one server against one and two replicas of one core, on this machine.

    python benchmarks/ray_serving.py [--requests 96] [--in-flight 16] [--tokens 48]

A random family of a 110M-parameter Mixtral in bfloat16, two variants, prompts of 64 token ids. The clients, Ray's own
processes and the ingress share the cores with the engines. CPU a token is that of all of Ray's processes but the
engines, while streams run, above what they take when nothing runs.
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
from pathlib import Path
from typing import Any

import httpx
import psutil

from polymoe.bench.family import MANY_MIXTRAL
from polymoe.bench.written_family import write_variant
from polymoe.deploy.build import build_app
from polymoe.deploy.config import DeployConfig, Pool
from polymoe.deploy.installed import require_ray
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

    def __init__(self, url: str, tokens: int, seed: int = 0) -> None:
        self._url, self._tokens, self._random = url, tokens, random.Random(seed)

    def _body(self, **more: Any) -> dict[str, Any]:
        prompt = [self._random.randrange(2, 4096) for _ in range(64)]
        return {
            "model": self._random.choice(VARIANTS), "prompt": prompt, "max_tokens": self._tokens, "ignore_eos": True,
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


def ray_cpu() -> float:
    """CPU seconds so far of this process's descendants, without engines."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "polymoe.engine.process" not in process.cmdline():
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def alone(bundle: Path, options: argparse.Namespace) -> dict[str, float]:
    port = free_port()
    command = [
        sys.executable, "-c", "from polymoe.cli.main import main; main()", "serve", str(bundle), "--port", str(port),
        "--threads", "1", "--kv-cache", str(KV), "--device", "cpu",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url)
        return measure(Load(url, options.tokens), options)
    finally:
        server.terminate()
        server.wait(30)


def measure(load: Load, options: argparse.Namespace) -> dict[str, float]:
    asyncio.run(load.throughput(8, 4))  # warm
    first = asyncio.run(load.first_tokens(options.first))
    rate = asyncio.run(load.throughput(options.requests, options.in_flight))
    return {"p50_first_token_ms": round(1000 * statistics.median(first), 2), "tokens_per_second": round(rate, 1)}


def with_ray(bundle: Path, replicas: int, port: int, options: argparse.Namespace) -> dict[str, float]:
    from ray import serve

    engine = {"num_threads": 1, "kv_cache_bytes": KV, "device": "cpu"}
    pool = Pool(name="pool", sources=[str(bundle)], replicas=replicas, cpus=1.0, engine=engine)
    config = DeployConfig(server=ServerSettings(port=port), pools=(pool,))
    serve.run(build_app(config), name="bench")
    load = Load(f"http://127.0.0.1:{port}", options.tokens)
    found = measure(load, options)
    began, cpu = time.monotonic(), ray_cpu()
    time.sleep(3.0)
    idle = (ray_cpu() - cpu) / (time.monotonic() - began)
    began, cpu = time.monotonic(), ray_cpu()
    asyncio.run(load.throughput(options.requests // 2, options.in_flight, stream=True))
    used = ray_cpu() - cpu - idle * (time.monotonic() - began)
    found["cpu_ms_per_streamed_token"] = round(1000 * used / (options.requests // 2 * options.tokens), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("requests", 96), ("in-flight", 16), ("tokens", 48), ("first", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require_ray()  # before Ray is imported
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder))
        found: dict[str, Any] = {"cores": os.cpu_count(), "server": alone(bundle, options)}
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        try:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            for replicas in (1, 2):
                found[f"ray_{replicas}"] = with_ray(bundle, replicas, port, options)
                print(json.dumps(found), file=sys.stderr, flush=True)
            serve.shutdown()
        finally:
            ray.shutdown()
    one, two = found["ray_1"], found["ray_2"]
    found["two_over_one"] = round(two["tokens_per_second"] / one["tokens_per_second"], 3)
    found["added_first_token_ms"] = round(one["p50_first_token_ms"] - found["server"]["p50_first_token_ms"], 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
