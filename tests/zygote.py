"""Processes for tests, forked from one that has imported torch, transformers and polymoe already.

A fresh Python takes about five seconds of a core to import what an engine or a plan needs, and the tests start dozens.
A fork has the same program, arguments, environment, descriptors and end, and memory of its own. That a fresh Python can
start a server and its engine is tested in test_server_life.py and test_demo.py.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENGINE = "polymoe.engine.process"
RUN_ENGINE = f"import sys; from {ENGINE} import main; sys.exit(main())"
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

    def kill(self) -> None:
        """At once."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """The process that forks; started when it is first needed, and it ends with the one that has started it."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}

    def fork(
        self, source: str, *arguments: str, out: int = 1, error: int = 2, fd: int | None = None,
        environment: Mapping[str, str] | None = None, folder: Path | None = None,
    ) -> Forked:  # fmt: skip
        """Run a Python program. out, error: descriptors of its standard output and error; fd: what is 3 there."""
        asked = dict(os.environ if environment is None else environment)
        report, theirs = os.pipe()
        message = json.dumps([source, ["python", *arguments], asked, str(folder or Path.cwd())]).encode()
        try:
            socket.send_fds(self._started(), [message], [theirs, out, error, *([] if fd is None else [fd])])
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


def serve(control: socket.socket) -> None:
    """Fork a process for every message of the control socket, until it is closed."""
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401  (what most tests serve)

    import polymoe.cli.main
    import polymoe.engine.process
    import polymoe.llm.llm
    import polymoe.offline.api  # noqa: F401

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
            message, fds, _, _ = socket.recv_fds(control, 1 << 18, 4)
            if not message:
                return
            report = fds[0]
            if (pid := os.fork()) == 0:
                for other in (control.detach(), report, *running, *(to for _, to in running.values())):
                    os.close(other)
                _become(json.loads(message), fds[1:])
            for given in fds[1:]:
                os.close(given)
            running[os.pidfd_open(pid)] = pid, report
            _say(report, pid)


def _say(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(report, f"{number}\n".encode())


def _become(message: list[Any], fds: list[int]) -> None:
    """The program, to its end, without what this process has to do at its own."""
    code = 1
    try:
        targets = [1, 2, 3][: len(fds)]
        for fd, target in zip(fds, targets, strict=True):  # one that is 3 itself is the first, or stays where it is
            os.dup2(fd, target)
        for fd in {*fds} - {*targets}:
            os.close(fd)
        source, sys.argv, environment, folder = message
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
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
