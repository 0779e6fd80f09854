"""The engine process: one `EngineCore`, driven by commands from the server over an inherited socket.

    python -m polymoe.engine.process --fd N

It ends when told to, when the server's end of the socket is closed (so a killed server leaves no engine behind), or,
with exit code 1, on any error, after a `Fatal` message. Signals meant for the process group (Ctrl-C, a supervisor's
SIGTERM, a terminal that is closed) are left to the server, which lets running requests finish first.
"""

import argparse
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from polymoe.native import quiet_torch  # noqa: F401  (first: it loads torch)

# isort: split
from polymoe.config import EngineConfig
from polymoe.engine.channel import Channel
from polymoe.engine.core import EngineCore
from polymoe.errors import PolymoeError, RequestError
from polymoe.protocol.messages import (
    Abort,
    Accepted,
    Add,
    AddVariant,
    CancelAdd,
    ChangeFailed,
    Command,
    DropVariant,
    Fatal,
    GetStats,
    Outputs,
    Progress,
    Ready,
    Rejected,
    Shutdown,
    Start,
    Stats,
)

MakeCore = Callable[[EngineConfig, Callable[[str, float], None]], EngineCore]

# A step without output (a chunk of a long prompt) is reported this often, in seconds: proof of life without noise.
_SIGN_OF_LIFE_EVERY = 0.5
_LOOK_AGAIN = 0.002  # seconds that an idle engine waits for a command while variants come or go


def run(core: EngineCore, channel: Channel, commands: Sequence[Command] = ()) -> None:
    """Obey commands and step while there is work, until `Shutdown`."""
    last_sent = 0.0
    while True:
        for command in commands:
            if isinstance(command, Shutdown):
                return
            _obey(core, channel, command)
        if core.has_work():
            outputs = core.step()
            now = time.monotonic()
            if outputs or now - last_sent > _SIGN_OF_LIFE_EVERY:
                channel.send(Outputs(outputs))
                last_sent = now
        if core.live is not None and core.live.is_busy:
            for event in core.live.poll():
                channel.send(event)
        commands = channel.receive(_patience(core))


def _patience(core: EngineCore) -> float | None:
    """How long to wait for a command."""
    if core.has_work():
        return 0
    return _LOOK_AGAIN if core.live is not None and core.live.is_busy else None


def _obey(core: EngineCore, channel: Channel, command: Command) -> None:
    match command:
        case Add(submission, requests):
            added = []
            try:
                for request in requests:
                    core.add_request(request)
                    added.append(request.request_id)
            except RequestError as error:
                core.abort(added)
                channel.send(Rejected.of(submission, error))
            else:
                channel.send(Accepted(submission))
        case Abort(request_ids):
            core.abort(request_ids)
        case AddVariant(change, folder, addition):
            if core.live is None:
                channel.send(ChangeFailed(change, "variants cannot come and go here; start with --max-variants."))
            else:
                core.live.add(change, folder, addition)
        case CancelAdd(change):
            if core.live is not None:
                core.live.cancel(change)
        case DropVariant(change, place):
            assert core.live is not None
            core.live.drop(change, place)
        case GetStats(routing):
            channel.send(Stats(core.stats(routing)))


def main(make_core: MakeCore = EngineCore) -> int:
    """Returns the exit code.

    Args: `make_core`: config and progress -> the engine (benchmarks make one without a bundle's folder).
    """
    parser = argparse.ArgumentParser(prog="polymoe.engine.process")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the server")
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=parser.parse_args().fd))
    try:
        start, *more = channel.receive(None)
        if not isinstance(start, Start):
            raise TypeError(f"expected Start, got {type(start).__name__}")
        core = make_core(start.config, lambda stage, fraction: channel.send(Progress(stage, fraction)))
        core.warm_up(lambda fraction: channel.send(Progress("kernels", fraction)))
        channel.send(Ready(core.info))
        run(core, channel, more)
    except (EOFError, ConnectionError):
        return 0  # nobody is left to serve
    except Exception as error:
        deliberate = isinstance(error, PolymoeError)
        if not deliberate:
            traceback.print_exc()
        channel.send(Fatal(str(error) if deliberate else f"{type(error).__name__}: {error}", deliberate))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
