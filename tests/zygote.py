"""Processes for tests, forked from one that has imported torch, transformers and polymoe already.

A fresh Python takes about five seconds of a core to import what an engine or a plan needs, and the tests start dozens.
A fork has the same program, arguments, environment, descriptors and end, and memory of its own. A program that starts
an engine itself, such as `polymoe serve`, is given one that waits to be told to start, its child as a fresh one would
be. That a fresh Python can start a server and its engine is tested in test_server_life.py and test_demo.py.
"""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

ENGINE = "polymoe.engine.process"
ENGINE_NAME = "polymoe engine"  # what the system calls the process of one that was forked; 15 letters at most
RUN_ENGINE = f"import sys; from {ENGINE} import main; sys.exit(main())"
RUN_PLANNER = "import sys; from polymoe.offline.addition.process import main; sys.exit(main())"
RUN_COMMAND = "from polymoe.cli.main import main; main()"
_READ_AT_IMPORT = ("POLYMOE_KERNELS", "TRITON_INTERPRET", "GOMP_SPINCOUNT", "PYTHONPATH")


class Forked:
    """As a `subprocess.Popen`. `report`: a pipe that says the process's id, then its exit code."""

    def __init__(self, report: int) -> None:
        self.returncode: int | None = None
        self._report = open(report, "rb", buffering=0)  # noqa: SIM115  (closed when the exit code has come)
        self.pid = int(self._report.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self._report.readline() or -signal.SIGKILL)  # nothing: the zygote is gone, and it too
            self._report.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Zygote:
    """The process that forks; started when it is first needed, and it ends with the one that has started it."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}

    def fork(
        self, source: str, *arguments: str, out: int = 1, error: int = 2, fd: int | None = None,
        environment: Mapping[str, str] | None = None, folder: Path | None = None, engines: int = 0, read: int = 0,
    ) -> Forked:  # fmt: skip
        """Run a Python program. out, error, read: descriptors of its standard output, error and input, of which a
        terminal becomes that of a session of its own; fd: what is 3 there; engines: how often it may start one."""
        asked = dict(os.environ if environment is None else environment)
        report, theirs = os.pipe()
        given = {1: out, 2: error} | ({} if read == 0 else {0: read}) | ({} if fd is None else {3: fd})
        asked_for = [source, ["python", *arguments], asked, str(folder or Path.cwd()), engines, list(given)]
        message = json.dumps(asked_for).encode()
        try:
            socket.send_fds(self._started(), [message], [theirs, *given.values()])
        finally:
            os.close(theirs)
        return Forked(report)

    def can(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork is as a fresh process: not where the difference is read when modules are imported."""
        if sys.platform != "linux":
            return False
        self._started()
        return all(environment.get(name) == self._environment.get(name) for name in _READ_AT_IMPORT)

    def _started(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._environment = dict(os.environ)
            with theirs:
                command = [sys.executable, "-P", __file__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        return self._control

    def close(self) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.wait(60)


zygote = Zygote()


def run_python(
    source: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own, to its end, with what it wrote."""
    if not zygote.can(os.environ if env is None else env):
        command = [sys.executable, "-c", source, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        fds = {"out": out.fileno(), "error": error.fileno()}
        code = zygote.fork(source, *arguments, **fds, environment=env, folder=cwd).wait()
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), error.read())


def engine_starter(fresh: Any) -> Any:
    """Of polymoe.client.connection: forks where they can be, else `fresh`, which is the package's own."""

    def start_process(module: str, fd: int) -> Any:
        if module != ENGINE or not zygote.can(os.environ):
            return fresh(module, fd)
        return zygote.fork(RUN_ENGINE, "--fd", "3", fd=fd)

    return start_process


class ForkedPlanner:
    """As the `asyncio.subprocess.Process` that `polymoe.server.planner.start_process` starts."""

    def __init__(self, process: Forked, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader) -> None:
        self.stdin, self.stdout, self.pid, self._process = stdin, stdout, process.pid, process

    @classmethod
    async def start(cls, *arguments: str) -> "ForkedPlanner":
        from polymoe.server.planner import LONGEST_LINE

        loop, stdout = asyncio.get_running_loop(), asyncio.StreamReader(limit=LONGEST_LINE)
        their_input, our_output = os.pipe()
        our_input, their_output = os.pipe()
        process = zygote.fork(RUN_PLANNER, *arguments, read=their_input, out=their_output)
        os.close(their_input)
        os.close(their_output)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdout), os.fdopen(our_input, "rb", 0))
        sending = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(our_output, "wb", 0))
        return cls(process, asyncio.StreamWriter(*sending, None, loop), stdout)

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        self.stdin.close()
        return await asyncio.to_thread(self._process.wait)


class Child:
    """As a `subprocess.Popen`, of a process that this one has forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(ENGINE, timeout)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._ended)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def _fork_engines(count: int) -> None:
    """Children that wait for the socket on which they are engines; `start_process` sends it to the next of them."""
    from polymoe.client import connection

    waiting: list[tuple[int, socket.socket]] = []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        if (pid := os.fork()) == 0:
            ours.close()
            for _, other in waiting:
                other.close()
            with theirs:
                _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            if not fds:  # the program has ended
                os._exit(0)
            Path("/proc/self/comm").write_text(ENGINE_NAME)
            _run(partial(_program, RUN_ENGINE, ["python", "--fd", str(fds[0])]))
        theirs.close()
        waiting.append((pid, ours))

    def start_process(module: str, fd: int) -> Child:
        assert module == ENGINE
        pid, to = waiting.pop(0)
        with to:
            socket.send_fds(to, [b"."], [fd])
        return Child(pid)

    connection.start_process = start_process  # type: ignore[assignment]


def serve(control: socket.socket) -> None:
    """Fork a process for every message of the control socket, until it is closed."""
    gc.disable()
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401  (what most tests serve)

    import polymoe.cli.main
    import polymoe.engine.process
    import polymoe.llm.llm
    import polymoe.offline.addition.process
    import polymoe.offline.api
    import polymoe.server.serve  # noqa: F401

    gc.freeze()  # what was imported: a forked process neither looks through it nor copies it for that
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"  # noqa: PTH208
    running: dict[int, tuple[int, int]] = {}  # a descriptor that says when it has ended -> (id, where that is reported)
    while True:
        for ready in select.select([control.fileno(), *running], [], [])[0]:
            if ready != control.fileno():
                pid, report = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _say(report, code)
                os.close(report)
                os.close(ready)
                continue
            message, fds, _, _ = socket.recv_fds(control, 1 << 18, 5)
            if not message:
                return
            report = fds[0]
            if (pid := os.fork()) == 0:
                for other in (control.detach(), report, *running, *(to for _, to in running.values())):
                    os.close(other)
                _run(partial(_become, json.loads(message), fds[1:]))
            for given in fds[1:]:
                os.close(given)
            running[os.pidfd_open(pid)] = pid, report
            _say(report, pid)


def _say(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(report, f"{number}\n".encode())


def _become(message: list[Any], fds: list[int]) -> None:
    """Run the program with what it is given."""
    source, arguments, environment, folder, engines, targets = message
    for fd, target in zip(fds, targets, strict=True):  # one that is 3 itself is the first, or stays where it is
        os.dup2(fd, target)
    for fd in {*fds} - {*targets}:
        os.close(fd)
    if 0 in targets and os.isatty(0):
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # What was opened on another kind of file believes that it can seek, or that it is a terminal.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stdout.reconfigure(write_through=bool(environment.get("PYTHONUNBUFFERED")))
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _fork_engines(engines)
    _program(source, arguments)


def _program(source: str, arguments: list[str]) -> None:
    sys.argv = arguments
    exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})


def _run(program: Callable[[], None]) -> NoReturn:
    """All that this process still does."""
    code = 1
    try:
        program()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the tests end first
    serve(socket.socket(fileno=int(sys.argv[1])))
