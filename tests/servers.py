"""Real servers for the tests: a tiny random bundle, the engine in its own process, HTTP on a free port."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx

from families import make_family
from polymoe.client.client import AsyncEngineClient
from polymoe.client.interface import Prompt
from polymoe.client.request_stream import RequestStream
from polymoe.config import EngineConfig
from polymoe.offline.api import make_plan
from polymoe.protocol.info import EngineStats
from polymoe.protocol.request import SamplingParams
from polymoe.server.app import create_app
from polymoe.server.serve import HttpServer, bind, uvicorn_config
from polymoe.server.settings import ServerSettings
from polymoe.server.state import ServerState

T = TypeVar("T")

CONTEXT = 1024  # tokens; long enough that a request surely runs when a test interferes
# Seconds for what always happens, however busy the machine is: only a test that fails waits so long.
START_LIMIT, LIMIT = 300.0, 120.0


def make_bundle(folder: Path, all_bytes: bool = False) -> Path:
    """Variants `base` and `v1`, unrelated random models with tokenizers and chat templates of their own."""
    paths = make_family(
        "mixtral", folder / "checkpoints", num_variants=2, perturb=None, tokenizer=True, all_bytes=all_bytes,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    make_plan(paths, "separate", None, folder / "bundle")
    return folder / "bundle"


def engine_config(bundle: Path, **options: Any) -> EngineConfig:
    return EngineConfig(bundle=str(bundle), device="cpu", num_threads=1, kv_cache_bytes=1 << 24, **options)


class ThreadServer:
    """The application and the engine's client in a thread of the test process, so that a test can look inside.

    Where the start fails nothing of it is left, no thread, no process; and no thread of it keeps Python from ending.
    """

    def __init__(self, config: EngineConfig, start_limit: float = START_LIMIT, **settings: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self.client = AsyncEngineClient(config)
        self._start_limit = start_limit
        self.settings = ServerSettings(port=self.port, **settings)
        app = create_app(self.client, self.settings)
        self.state: ServerState = app.state.server
        self._server = HttpServer(uvicorn_config(app, self.settings))
        self._thread = threading.Thread(target=self._run, name=f"server {self.port}", daemon=True)

    def __enter__(self) -> "ThreadServer":
        self._thread.start()
        try:
            self.wait_for(lambda: self._server.started or not self._thread.is_alive())
            self.call(self.client.start(), self._start_limit)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the server does not end"

    def _run(self) -> None:
        async def main() -> None:
            try:
                with bind("127.0.0.1", self.port) as sock:
                    await self._server.serve(sockets=[sock])
            finally:
                await self.state.variants.close()
                await cast(AsyncEngineClient, self.state.client).shutdown()
                await self.state.encoder.close()

        self.loop.run_until_complete(main())
        self.loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T], limit: float = LIMIT) -> T:
        """What a coroutine returns that runs in the server's loop; it is cancelled where it takes longer."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(limit)
        except TimeoutError:
            future.cancel()
            raise

    def stats(self) -> EngineStats:
        return self.call(self.client.stats())

    def is_idle(self) -> bool:
        """Nothing runs in the engine and nothing is remembered outside of it."""
        stats = self.stats()
        left = [*stats.running, *stats.waiting, self.client.processor.num_sequences, len(self.client.open_streams)]
        return not any(left) and stats.kv_usage == 0

    @contextlib.contextmanager
    def full(self, variant: str) -> Iterator[None]:
        """Long requests for `variant` hold every place of a batch and fill the queue, so that one more is refused."""
        config = self.client.config
        streams: list[RequestStream] = []
        long = SamplingParams(max_tokens=CONTEXT - 2, ignore_eos=True)

        async def close() -> None:
            for stream in streams:
                stream.close()

        try:
            for kind, count in (("running", config.max_num_seqs), ("waiting", config.max_waiting)):
                prompts: list[Prompt] = [(None, [5])] * count
                streams.append(self.call(self.client.submit(f"full-{kind}", variant, prompts, long)))
                self.wait_for(lambda kind=kind, count=count: sum(getattr(self.stats(), kind)) == count)  # type: ignore[misc]
            yield
        finally:
            self.call(close())
            self.wait_for(self.is_idle)

    def wait_for(self, condition: Callable[[], bool], timeout: float = LIMIT) -> None:
        wait_for(condition, timeout)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=LIMIT, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(condition: Callable[[], bool], timeout: float = LIMIT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def events(response: httpx.Response) -> Iterator[Any]:
    """The JSON of each server-sent event; "[DONE]" as it stands."""
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
