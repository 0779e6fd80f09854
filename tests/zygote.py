"""Engine processes for tests, forked from a process that has imported torch and transformers already.

A fresh Python takes about five seconds of a core to import what an engine needs, and the tests start dozens. A fork has
the same program, arguments, descriptors and end, and memory of its own. That a fresh Python can start it is tested
where a whole server is started (test_server_life.py, test_demo.py); other modules than the engine's own, and
environments that differ from the tests', always get one.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ENGINE = "polymoe.engine.process"
_NOT_COMPARED = {"PYTEST_CURRENT_TEST", "PYTEST_XDIST_TESTRUNUID", "COLUMNS", "LINES"}


class ForkedEngine:
    """What the client uses of a `subprocess.Popen`. `report`: a pipe that says the process's id, then its exit code."""

    def __init__(self, report: int) -> None:
        self.returncode: int | None = None
        self._report = open(report, "rb", buffering=0)  # noqa: SIM115  (closed when the exit code has come)
        self.pid = int(self._report.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(ENGINE, timeout)
            self.returncode = int(self._report.readline() or -signal.SIGKILL)  # nothing: the zygote is gone, and it too
            self._report.close()
        return self.returncode

    def kill(self) -> None:
        """At once."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """Started when the first engine is; it ends with the process that has started it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            self.environment = dict(os.environ)
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def fork(self, fd: int) -> ForkedEngine:
        """An engine at the other end of `fd`, which writes where this process does now."""
        report, theirs = os.pipe()
        try:
            socket.send_fds(self._control, [bytes(Path.cwd())], [fd, theirs, 1, 2])
        finally:
            os.close(theirs)
        return ForkedEngine(report)

    def close(self) -> None:
        self._control.close()
        self._process.wait(60)


class EngineStarter:
    """In place of the client's own: forks what can be forked."""

    def __init__(self, fresh: Any) -> None:
        self._fresh = fresh
        self._zygote: Zygote | None = None

    def __call__(self, module: str, fd: int) -> Any:
        if module != ENGINE or sys.platform != "linux":
            return self._fresh(module, fd)
        zygote = self._zygote = self._zygote or Zygote()
        if _compared(zygote.environment) != _compared(os.environ):
            return self._fresh(module, fd)
        return zygote.fork(fd)

    def close(self) -> None:
        if self._zygote is not None:
            self._zygote.close()


def _compared(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _NOT_COMPARED}


def serve(control: socket.socket) -> None:
    """Fork an engine for every message of the control socket, until it is closed."""
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401  (what most tests serve)

    import polymoe.engine.process

    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"  # noqa: PTH208
    engines: dict[int, tuple[int, int]] = {}  # a descriptor that says when it has ended -> (id, where that is reported)
    while True:
        for ready in select.select([control, *engines], [], [])[0]:
            if ready is not control:
                pid, report = engines.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _say(report, code)
                os.close(report)
                os.close(ready)
                continue
            folder, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 4)
            if not folder:
                return
            fd, report, out, error = descriptors
            if (pid := os.fork()) == 0:
                for other in (control.detach(), report, *engines, *(to for _, to in engines.values())):
                    os.close(other)
                os.dup2(out, 1)
                os.dup2(error, 2)
                os.chdir(folder)
                sys.argv = [ENGINE, "--fd", str(fd)]
                _end_with(polymoe.engine.process.main)
            for given in (fd, out, error):
                os.close(given)
            engines[os.pidfd_open(pid)] = pid, report
            _say(report, pid)


def _say(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(report, f"{number}\n".encode())


def _end_with(main: Any) -> None:
    """Without what this process has to do at its end."""
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the tests end first
    serve(socket.socket(fileno=int(sys.argv[1])))
