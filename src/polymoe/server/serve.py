"""Running a server: from the free port to the exit code."""

import asyncio
import contextlib
import errno
import functools
import signal
import socket
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.errors import ConfigError
from polymoe.progress import stage_progress
from polymoe.server.app import create_app
from polymoe.server.connection import ACCEPTED_AT_ONCE, Connection, ConnectionLimits
from polymoe.server.errors import UnavailableError
from polymoe.server.logs import configure_logging
from polymoe.server.settings import ServerSettings
from polymoe.server.state import ServerState
from polymoe.server.summary import print_summary
from polymoe.server.traces import Tracer, tracer_from_environment

# After the grace time streams are ended with an error; this long they may take to send it, in seconds.
_LAST_WORDS = 3.0
_MAX_HEADER_BYTES = 64 << 10
_LOOK_EVERY = 0.05  # seconds
_STUCK_EVERY = 1.0  # seconds
_MOST_RESTARTS, _RESTARTS_WITHIN = 3, 600.0  # of the engine; seconds
_BACKLOG = 1024  # connections that the system keeps until they are accepted


def check_address(settings: ServerSettings) -> None:
    """Raises `ConfigError` unless `run_server` could listen there now: to be called before anything slow."""
    bind(settings.host, settings.port).close()


def run_server(config: EngineConfig, settings: ServerSettings, *, console: Console | None = None) -> int:
    """Serve a bundle until SIGTERM, SIGINT or SIGHUP.

    Returns the exit code: 0 after a stop that was asked for, 1 when the engine died.
    Raises: `PolymoeError` for what prevents the start (the port is in use, the bundle cannot be loaded …).
    """
    console = console or Console()
    configure_logging(settings.log_format, settings.log_level)
    tracer = tracer_from_environment()
    sock = bind(settings.host, settings.port)  # before minutes are spent on loading
    try:
        return asyncio.run(_serve(config, settings, sock, console, tracer))
    finally:
        sock.close()
        if tracer is not None:
            tracer.close()


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """A socket on that address, so that nobody else can take it, but for processes of this user that want it `shared`
    too: the system spreads connections over them. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"{host} is not an address of this machine; choose another with --host.") from error
    sock = socket.socket(family, kind, protocol)
    # A port whose last connections are only waiting to be forgotten counts as free.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind(address)
        # Linux lets two sockets bind before one of them listens; only now the port is ours.
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use; choose another with --port.") from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"port {port} needs more rights; choose one above 1023 with --port.") from error
        raise ConfigError(f"{host} is not an address of this machine; choose another with --host.") from error
    return sock


async def _serve(
    config: EngineConfig, settings: ServerSettings, sock: socket.socket, console: Console, tracer: Tracer | None
) -> int:
    app = create_app(AsyncEngineClient(config), settings)
    state: ServerState = app.state.server
    state.preparing, state.tracer = True, tracer
    server = HttpServer(uvicorn_config(app, settings))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            console.quiet = True  # the terminal may be gone
        if stop.is_set():  # asked twice: do not wait for the running requests
            _client(state).fail_all(_shutting_down())
        stop.set()

    signals = stop_signals()
    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    http = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        if await _before(stop, _load(state, console)):
            print_summary(console, _client(state), settings.host, sock.getsockname()[1], settings)
            state.preparing = False
            await _before(stop, _attend(state, settings, console))
        state.draining = True
        if not state.client.dead.is_set():
            await _drain(state, settings.grace)
    finally:
        state.draining = server.should_exit = True
        await asyncio.wait({http}, timeout=_LAST_WORDS)
        await state.variants.close()
        await _client(state).shutdown()
        await state.encoder.close()
        await http
        for number in signals:
            loop.remove_signal_handler(number)
    if state.client.dead.is_set():
        console.print("The engine stopped unexpectedly; the server ends so that it can be restarted.", style="red")
        return 1
    return 0


def stop_signals() -> list[signal.Signals]:
    """What asks the server to stop: a closed terminal too, unless it was started with `nohup`."""
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if kept else [signal.SIGHUP])]


class HttpServer(uvicorn.Server):
    """Leaves signals to us: uvicorn would end the process by the signal, and the exit code is to be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept a few connections at a time, so that their number is known before there are too many."""
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(_BACKLOG)  # uvicorn's `backlog` is both


def uvicorn_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, limits=ConnectionLimits(settings)),  # type: ignore[arg-type]
        ws="none",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        log_level="error",  # its warnings are one for each bad request
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        timeout_graceful_shutdown=int(_LAST_WORDS),
    )


def _client(state: ServerState) -> AsyncEngineClient:
    """That of now: a new plan comes with another engine."""
    return cast(AsyncEngineClient, state.client)


async def _load(state: ServerState, console: Console) -> None:
    client = _client(state)
    with stage_progress(console) as show:

        def on_progress(stage: str, fraction: float) -> None:
            state.set_progress(stage, fraction)
            show(stage, fraction)

        rendering = asyncio.create_task(state.encoder.warm_up())  # while the engine loads
        await (client.restart if client.dead.is_set() else client.start)(on_progress)
        state.settings.check_variants([variant.name for variant in client.processor.served])
        await rendering
    for tokenizer in client.processor.tokenizers:
        await state.encoder.check_template(tokenizer)
    if state.settings.admin_key is not None:
        await state.variants.start()


async def _attend(state: ServerState, settings: ServerSettings, console: Console) -> None:
    """Return when the engine has died, and is not to be started again."""
    restarts: deque[float] = deque(maxlen=_MOST_RESTARTS)
    while True:
        client = _client(state)
        dead = asyncio.create_task(client.dead.wait())
        try:
            while client is state.client and not (await asyncio.wait({dead}, timeout=_STUCK_EVERY))[0]:
                if settings.restart_engine and client.is_stuck(settings.heartbeat_timeout):
                    console.print("The engine makes no progress; it is ended.", style="red")
                    client.kill()
        finally:
            dead.cancel()
        if client is not state.client:
            continue
        often = len(restarts) == _MOST_RESTARTS and time.monotonic() - restarts[0] < _RESTARTS_WITHIN
        if not settings.restart_engine or often:
            return
        restarts.append(time.monotonic())
        state.metrics.engine_restarts.inc()
        console.print("The engine stopped unexpectedly; it is started again.", style="red")
        await _load(state, console)


async def _drain(state: ServerState, grace: float) -> None:
    """Wait for the running requests, while new ones are told to go elsewhere; what has not ended after `grace` seconds
    ends with an error."""
    deadline = time.monotonic() + grace
    while state.in_flight and time.monotonic() < deadline and not state.client.dead.is_set():
        await asyncio.sleep(_LOOK_EVERY)
    _client(state).fail_all(_shutting_down())


def _shutting_down() -> UnavailableError:
    return UnavailableError("The server is shutting down.", code="draining")


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
