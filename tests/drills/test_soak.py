"""Half an hour of everything that clients do, right and wrong: memory stays where it is after the warm-up."""

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from process_server import ProcessServer
from servers import CONTEXT, wait_for
from tool_bundle import make_tool_bundle

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
RATE = float(os.environ.get("SOAK_RATE", "4"))  # requests a second
WARM_UP = 1 / 3  # of the time
FLAT = 1.03
SAMPLE_EVERY = 2.0  # seconds

PROMPT = {"prompt": "the fox", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


class Client:
    """Sends one request after the other, each drawn at random, and checks what must hold of its answer."""

    def __init__(self, url: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=120)
        self.statuses: Counter[int] = Counter()
        self.greedy: dict[str, str] = {}

    async def post(self, path: str, body: dict[str, Any] | str) -> httpx.Response:
        content = body if isinstance(body, str) else json.dumps(body)
        response = await self.http.post(path, content=content, headers={"Content-Type": "application/json"})
        self.statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        return response

    async def step(self) -> None:
        await self.random.choice([
            self.same, self.same, self.stream, self.stream, self.leave, self.chat, self.schema, self.many, self.tools,
            self.other_doors, self.wrong, self.look,
        ])()  # fmt: skip

    def model(self) -> str:
        return self.random.choice(["base", "v1", "v2"])

    def words(self, most: int) -> str:
        return " ".join(self.random.choices(["the", "fox", "dog", "red", "says"], k=self.random.randint(1, most)))

    async def same(self) -> None:
        """A neighbour's work changes no greedy answer."""
        model = self.model()
        answer = (await self.post("/v1/completions", {"model": model, **PROMPT})).json()["choices"][0]["text"]
        assert self.greedy.setdefault(model, answer) == answer

    async def stream(self, leave_after: int | None = None) -> None:
        body = {"model": self.model(), "prompt": self.words(200), "max_tokens": 60, "stream": True, "ignore_eos": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            self.statuses[response.status_code] += 1
            lines = [line async for line in _first(response, leave_after) if line]
        assert leave_after is not None or lines[-1] == "data: [DONE]"
        assert '"error"' not in lines[-1]

    async def leave(self) -> None:
        await self.stream(leave_after=self.random.randint(1, 20))

    async def chat(self) -> None:
        messages = [{"role": "user", "content": self.words(50)}]
        body = {"model": self.model(), "messages": messages, "max_tokens": 20, "stop": ["zz", "fox fox"]}
        assert (await self.post("/v1/chat/completions", body)).status_code == 200

    async def schema(self) -> None:
        """Another one each time, so that no cache of schemas can grow for ever."""
        name = f"field{self.random.randrange(10**9)}"
        members = {"properties": {name: {"type": "boolean"}}, "required": [name], "additionalProperties": False}
        schema = {"type": "object", **members}
        body = {"model": "base", "prompt": "the", "max_tokens": 40}
        await self.post("/v1/completions", body | {"structured_outputs": {"json": schema}})

    async def many(self) -> None:
        body = {"model": self.model(), "prompt": [self.words(20)] * 3, "n": 4, "logprobs": 5, "max_tokens": 10}
        assert len((await self.post("/v1/completions", body)).json()["choices"]) == 12

    async def tools(self) -> None:
        messages = [{"role": "user", "content": self.words(20)}]
        body = {"model": "base", "messages": messages, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 20}
        assert (await self.post("/v1/chat/completions", body)).status_code == 200

    async def other_doors(self) -> None:
        turn = {"model": self.model(), "max_tokens": 10, "messages": [{"role": "user", "content": self.words(20)}]}
        assert (await self.post("/v1/messages", turn)).status_code == 200
        assert (await self.post("/v1/responses", {"model": "base", "input": "fox"})).status_code in (200, 400)
        assert (await self.post("/tokenize", {"model": "base", "prompt": self.words(2000)})).status_code == 200

    async def wrong(self) -> None:
        for body in (
            {"model": f"none{self.random.random()}", "prompt": "a"}, "{", {"model": "base"},
            {"model": "base", "prompt": "a", f"field{self.random.random()}": 1},
            {"model": "base", "prompt": "the " * 2 * CONTEXT},
            {"model": "base", "prompt": "a", "structured_outputs": {"regex": "(" * self.random.randint(1, 99)}},
        ):  # fmt: skip
            assert 400 <= (await self.post("/v1/completions", body)).status_code < 500
        self.statuses[(await self.http.get(f"/none/{self.random.random()}")).status_code] += 1

    async def look(self) -> None:
        for path in ("/metrics", "/v1/models", "/health", "/openapi.json"):
            assert (await self.http.get(path)).status_code == 200


async def _first(response: httpx.Response, count: int | None) -> Any:
    seen = 0
    async for line in response.aiter_lines():
        yield line
        seen += 1
        if count is not None and seen > count:
            return


async def traffic(url: str, seconds: float, sample: Any) -> Counter[int]:
    """RATE requests a second by eight clients, until the time is up; `sample` is called meanwhile."""
    clients = [Client(url, seed) for seed in range(8)]
    greedy: dict[str, str] = {}
    for client in clients:
        client.greedy = greedy  # one for all
    deadline = time.monotonic() + seconds

    async def run(client: Client) -> None:
        while time.monotonic() < deadline:
            await client.step()
            await asyncio.sleep(client.random.expovariate(RATE / len(clients)))

    async def watch() -> None:
        while time.monotonic() < deadline:
            await asyncio.sleep(SAMPLE_EVERY)
            sample()

    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(run(client))
        group.create_task(watch())
    for client in clients:
        await client.http.aclose()
    return sum((client.statuses for client in clients), Counter())


@pytest.mark.soak
def test_memory_stays_where_it_is(tmp_path: Path) -> None:
    """The median of each tenth of the time after the warm-up, of every process of the server."""
    bundle = make_tool_bundle(tmp_path / "bundle")
    with ProcessServer(bundle, tmp_path, 5.0) as server:
        server.wait_until_ready()
        tree = server.tree()
        samples: dict[str, list[int]] = {name: [] for name in tree}

        def sample() -> None:
            for name, process in tree.items():
                samples[name].append(process.memory_info().rss if process.is_running() else 0)

        began = {name: process.cpu_times() for name, process in tree.items()}
        statuses = asyncio.run(traffic(server.url, 60 * MINUTES, sample))
        wait_for(server.is_idle)
        spent = {name: _seconds(process.cpu_times()) - _seconds(began[name]) for name, process in tree.items()}
        files = tree["server"].num_fds()
    print(f"\n{sum(statuses.values())} answers {dict(sorted(statuses.items()))}; {files} open files at the end")
    grown = {}
    for name, taken in samples.items():
        tenths = [statistics.median(part) / (1 << 20) for part in _parts(taken, 10)]
        warm = tenths[round(10 * WARM_UP) :]
        grown[name] = max(warm) / warm[0]
        print(f"{name:12} {spent[name]:6.1f} s CPU, MiB:", *(f"{value:.1f}" for value in tenths), f"x{grown[name]:.4f}")
    assert files < 64
    assert all(growth < FLAT for growth in grown.values()), grown


def _seconds(times: "psutil._common.pcputimes") -> float:
    return float(times.user + times.system)


def _parts(values: list[int], count: int) -> list[list[int]]:
    assert len(values) >= count, "too short a soak"
    bounds = [len(values) * k // count for k in range(count + 1)]
    return [values[a:b] for a, b in itertools.pairwise(bounds)]
