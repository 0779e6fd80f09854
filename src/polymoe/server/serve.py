"""Running a server: from the free port to the exit code."""

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TimeElapsedColumn

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.console import Console, DescriptionColumn
from polymoe.errors import ConfigError
from polymoe.progress import say_stage
from polymoe.server.app import create_app
from polymoe.server.errors import UnavailableError
from polymoe.server.settings import ServerSettings
from polymoe.server.state import ServerState
from polymoe.server.summary import print_summary

# After the grace time streams are ended with an error; this long they may take to send it, in seconds.
_LAST_WORDS = 3.0
_MAX_HEADER_BYTES = 64 << 10


def check_address(settings: ServerSettings) -> None:
    """Raises `ConfigError` unless `run_server` could listen there now: to be called before anything slow."""
    bind(settings.host, settings.port).close()


def run_server(config: EngineConfig, settings: ServerSettings, *, console: Console | None = None) -> int:
    """Serve a bundle until SIGTERM, SIGINT or SIGHUP.

    Returns the exit code: 0 after a stop that was asked for, 1 when the engine died.
    Raises: `PolymoeError` for what prevents the start (the port is in use, the bundle cannot be loaded …).
    """
    console = console or Console()
    sock = bind(settings.host, settings.port)  # before minutes are spent on loading
    try:
        return asyncio.run(_serve(config, settings, sock, console))
    finally:
        sock.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, so that nobody else can take it. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"{host} is not an address of this machine; choose another with --host.") from error
    sock = socket.socket(family, kind, protocol)
    # A port whose last connections are only waiting to be forgotten counts as free.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        # Linux lets two sockets bind before one of them listens; only now the port is ours.
        sock.listen(1024)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use; choose another with --port.") from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"port {port} needs more rights; choose one above 1023 with --port.") from error
        raise ConfigError(f"{host} is not an address of this machine; choose another with --host.") from error
    return sock


async def _serve(config: EngineConfig, settings: ServerSettings, sock: socket.socket, console: Console) -> int:
    client = AsyncEngineClient(config)
    app = create_app(client, settings)
    state: ServerState = app.state.server
    server = _Server(_uvicorn_config(app, settings))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            console.quiet = True  # the terminal may be gone
        if stop.is_set():  # asked twice: do not wait for the running requests
            client.fail_all(UnavailableError("The server is shutting down.", code="draining"))
        stop.set()

    signals = stop_signals()
    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    http = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        if await _before(stop, _load(client, state, console)):
            print_summary(console, client, settings.host, sock.getsockname()[1], settings.api_key is not None)
            await _before(stop, client.dead.wait())
        state.draining = True
        server.should_exit = True
        await _drain(client, http, settings.grace)
    finally:
        server.should_exit = True
        await client.shutdown()
        await http
        for number in signals:
            loop.remove_signal_handler(number)
    if client.dead.is_set():
        console.print("The engine stopped unexpectedly; the server ends so that it can be restarted.", style="red")
        return 1
    return 0


def stop_signals() -> list[signal.Signals]:
    """What asks the server to stop: a closed terminal too, unless it was started with `nohup`."""
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if kept else [signal.SIGHUP])]


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would end the process by the signal, and the exit code is to be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",  # its limit on headers is a documented option
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Longer than clients keep idle connections, so that they do not write into one that is being closed.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.grace + _LAST_WORDS) + 1,
    )


async def _load(client: AsyncEngineClient, state: ServerState, console: Console) -> None:
    with _progress_bars(console) as show:

        def on_progress(stage: str, fraction: float) -> None:
            state.set_progress(stage, fraction)
            show(stage, fraction)

        info = await client.start(on_progress)
        state.settings.check_variants([variant.name for variant in info.variants])


async def _drain(client: AsyncEngineClient, http: "asyncio.Task[None]", grace: float) -> None:
    """Wait for the running requests; what has not ended after `grace` seconds ends with an error."""
    done, _ = await asyncio.wait({http}, timeout=grace)
    if not done:
        client.fail_all(UnavailableError("The server is shutting down.", code="draining"))
        await asyncio.wait({http}, timeout=_LAST_WORDS)


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Whether `work` came to its end before `stop`, which cancels it. Raises what `work` raises."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        for future in (task, stopped):
            future.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


@contextlib.contextmanager
def _progress_bars(console: Console) -> Iterator[Callable[[str, float], None]]:
    """One bar a stage; where there is no terminal, one line a stage that took a while."""
    if not console.is_terminal:
        started: dict[str, float] = {}

        def say(stage: str, fraction: float) -> None:
            began = started.setdefault(stage, time.monotonic())
            if fraction >= 1:
                say_stage(console, stage, time.monotonic() - began)

        yield say
        return
    columns = (DescriptionColumn(), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as progress:

        def show(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=fraction)

        yield show
