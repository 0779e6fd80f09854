"""`run_server` from the start to the exit code, as a supervisor sees it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from polymoe.server.serve import stop_signals
from process_server import BODY, ProcessServer
from servers import CONTEXT, make_bundle, wait_for


class Terminal:
    """A pseudo-terminal, which somebody reads until it is closed."""

    def __init__(self) -> None:
        self.printed = b""
        self._ours, self.theirs = os.openpty()
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while not self._closing.is_set():
                if select.select([self._ours], [], [], 0.02)[0]:
                    self.printed += os.read(self._ours, 1 << 16)

    def close(self) -> None:
        self._closing.set()
        self._reader.join()
        os.close(self._ours)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("life"))


@pytest.fixture
def server(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Iterator[ProcessServer]:
    """One a test, since each test ends its server; the parameter is its grace time in seconds."""
    with ProcessServer(bundle, tmp_path, getattr(request, "param", 30.0), fresh=False) as server:
        yield server


def test_sigterm_lets_running_requests_finish(bundle: Path, tmp_path: Path) -> None:
    with ProcessServer(bundle, tmp_path, 30.0) as server:
        _stop_during_a_stream(server)


def _stop_during_a_stream(server: ProcessServer) -> None:
    def stop(engine: psutil.Process) -> None:
        # A supervisor, Ctrl-C or a closed terminal signals the whole group; the engine must not die of it.
        for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            engine.send_signal(sent)
        server.stop(engine)
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        refused = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        assert 'vllm:num_requests_running{model_name="base"} 1.0' in httpx.get(f"{server.url}/metrics").text

    seen, code = server.during_a_stream(stop)
    assert code == 0
    assert seen[-1] == "[DONE]"
    assert seen[-2]["choices"][0]["finish_reason"] == "length"
    assert len(seen) == CONTEXT - 50 + 1
    printed = server.log.read_text()
    for words in ("base", "v1", "16 resident, 0 absent", "slots", "KV cache", f"{server.url}/v1", "curl "):
        assert words in printed
    assert "Traceback" not in printed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks servers here; cannot run here")
def test_a_closed_terminal_lets_running_requests_finish(bundle: Path, tmp_path: Path) -> None:
    """SIGHUP, which server and engine get then, ended the server at once, and clients got half an answer. Nothing can
    be printed any more by then."""
    terminal = Terminal()
    options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.theirs)
    server = ProcessServer(bundle, tmp_path, 30.0, fresh=False, **options)
    os.close(terminal.theirs)
    try:
        seen, code = server.during_a_stream(lambda _: terminal.close())
    finally:
        server.process.kill()
        server.process.wait()
    assert code == 0
    assert seen[-1] == "[DONE]"
    assert seen[-2]["choices"][0]["finish_reason"] == "length"
    assert b"curl " in terminal.printed


def test_nohup_keeps_a_server_running() -> None:
    """A shell starts it with SIGHUP ignored, and that is meant to stay so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("server", [0.0], indirect=True)
def test_after_the_grace_time_streams_end_with_an_error(server: ProcessServer) -> None:
    server.wait_until_ready()
    (curl,) = (line for line in server.log.read_text().splitlines() if line.startswith("curl "))
    answer = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True, timeout=60).stdout
    assert '"chat.completion"' in answer, "the curl line it prints works"
    seen, code = server.during_a_stream(server.stop)
    assert code == 0
    assert seen[-1] == "[DONE]"
    assert seen[-2]["error"]["code"] == "draining"


def test_a_killed_engine_ends_streams_and_server(server: ProcessServer) -> None:
    seen, code = server.during_a_stream(lambda engine: engine.kill())
    assert code == 1
    assert seen[-1] == "[DONE]"
    assert seen[-2]["error"]["code"] == "engine_dead"
    assert "engine stopped unexpectedly" in server.log.read_text()


@pytest.mark.parametrize("server", [0.0], indirect=True)
def test_what_was_not_accepted_when_the_grace_time_ends_is_refused(server: ProcessServer) -> None:
    """It got a plain-text 500."""
    server.wait_until_ready()
    engine = server.engine()
    engine.send_signal(signal.SIGSTOP)
    answers: list[httpx.Response] = []
    body = {**BODY, "stream": False}
    waiting = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30))
    )
    waiting.start()
    wait_for(lambda: "ESTABLISHED" in {c.status for c in psutil.Process(server.process.pid).net_connections("tcp")})
    time.sleep(0.3)
    server.stop(engine)
    waiting.join(20)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining")
    assert server.process.wait(20) == 0
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_a_dead_engine_is_started_again_if_that_is_wanted(bundle: Path, tmp_path: Path) -> None:
    with ProcessServer(bundle, tmp_path, 30.0, "--restart-engine", fresh=False) as server:
        server.wait_until_ready()
        engine = server.engine()
        seen: list[Any] = []
        running = threading.Event()
        reader = threading.Thread(target=server.stream, args=(seen, running, CONTEXT - 50))
        reader.start()
        assert running.wait(30)
        engine.kill()
        reader.join(10)
        assert seen[-2]["error"]["code"] == "engine_dead"
        server.wait_until_ready()
        assert server.engine().pid != engine.pid
        answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": False, "max_tokens": 3}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert "polymoe:engine_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
