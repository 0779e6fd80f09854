"""The engine dies or hangs, the server is told to stop, the KV cache is too small: no client hangs, none is lost."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from drills.load import Answer, say, streams
from process_server import ProcessServer
from servers import CONTEXT, make_bundle, wait_for

pytestmark = pytest.mark.drill
VARIANTS = ("base", "v1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("faults"))


def greedy(k: int, tokens: int) -> dict[str, Any]:
    prompt = "the fox " * (1 + k % 8)
    return {"model": VARIANTS[k % 2], "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def under_load(server: ProcessServer, count: int, tokens: int, action: Callable[[], None]) -> list[Answer]:
    """`count` streams; `action` happens while they run."""
    found: list[Answer] = []
    bodies = [greedy(k, tokens) for k in range(count)]
    clients = threading.Thread(target=lambda: found.extend(asyncio.run(streams(server.port, bodies))))
    clients.start()
    wait_for(lambda: httpx.get(f"{server.url}/load").json()["server_load"] == count)
    time.sleep(0.5)
    action()
    clients.join(200)
    assert not clients.is_alive(), "a client hangs"
    return found


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_engine_is_killed_under_fifty_streams(bundle: Path, tmp_path: Path) -> None:
    with ProcessServer(bundle, tmp_path, 30.0) as server:
        server.wait_until_ready()
        engine = server.engine()
        killed = [0.0]

        def kill() -> None:
            killed[0] = time.monotonic()
            engine.kill()

        answers = under_load(server, 50, CONTEXT - 100, kill)
        took = time.monotonic() - killed[0]
        assert server.process.wait(20) == 1
        assert all(answer.done and answer.error == "engine_dead" for answer in answers)
    say("engine killed under fifty streams", last_client_told_after_s=took)
    assert took < 5


def test_a_stopped_engine_is_replaced(bundle: Path, tmp_path: Path) -> None:
    """SIGSTOP: it is alive and says nothing."""
    env = {**os.environ, "POLYMOE_HEARTBEAT_TIMEOUT": "3"}
    with ProcessServer(bundle, tmp_path, 30.0, "--restart-engine", env=env) as server:
        server.wait_until_ready()
        engine = server.engine()
        began = [0.0]

        def stop() -> None:
            began[0] = time.monotonic()
            engine.send_signal(signal.SIGSTOP)

        answers = under_load(server, 50, CONTEXT - 100, stop)
        told = time.monotonic() - began[0]
        assert all(answer.done and answer.error == "engine_dead" for answer in answers), answers[0]
        server.wait_until_ready()
        back = time.monotonic() - began[0]
        assert is_gone(engine)
        again = asyncio.run(streams(server.port, [greedy(k, 20) for k in range(20)]))
        assert all(answer.done and not answer.error for answer in again)
        wait_for(server.is_idle)
    say("engine stopped under fifty streams", clients_told_after_s=told, serving_again_after_s=back)


def test_a_stopped_engine_goes_on(bundle: Path, tmp_path: Path) -> None:
    """Without `--restart-engine` the server says that it is stuck, and nothing is lost when it wakes up."""
    env = {**os.environ, "POLYMOE_HEARTBEAT_TIMEOUT": "2"}
    with ProcessServer(bundle, tmp_path, 30.0, env=env) as server:
        server.wait_until_ready()
        alone = asyncio.run(streams(server.port, [greedy(k, 300) for k in range(8)]))
        engine = server.engine()

        def stop() -> None:
            engine.send_signal(signal.SIGSTOP)
            wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503, timeout=20)
            assert httpx.get(f"{server.url}/health").json()["error"]["code"] == "engine_stuck"
            engine.send_signal(signal.SIGCONT)

        answers = under_load(server, 50, 300, stop)
        assert all(answer.done and not answer.error for answer in answers)
        assert [answer.text for answer in answers] == [alone[k % 8].text for k in range(50)]
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200)


def test_a_server_that_stops_loses_no_request(bundle: Path, tmp_path: Path) -> None:
    """SIGTERM with 64 requests that run and 136 that wait."""
    with ProcessServer(bundle, tmp_path, 150.0) as server:
        server.wait_until_ready()
        engine = server.engine()
        refused: list[httpx.Response] = []

        def stop() -> None:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            refused.extend(httpx.post(f"{server.url}/v1/completions", json=greedy(0, 5)) for _ in range(20))

        began = time.monotonic()
        answers = under_load(server, 200, 150, stop)
        assert server.process.wait(20) == 0
        took = time.monotonic() - began
        assert all(answer.done and not answer.error and answer.finish == "length" for answer in answers)
        assert {(r.status_code, r.json()["error"]["code"]) for r in refused} == {(503, "draining")}
        assert is_gone(engine)
    say("SIGTERM under two hundred streams", seconds=took, lost=0)


def test_a_full_kv_cache_preempts_and_stays_exact(bundle: Path, tmp_path: Path) -> None:
    """Room for two of sixty-four sequences of full length."""
    with ProcessServer(bundle, tmp_path, 30.0, "--max-num-seqs", "32", kv_cache="640KB") as server:
        server.wait_until_ready()
        alone = asyncio.run(streams(server.port, [greedy(0, 500)])) + asyncio.run(
            streams(server.port, [greedy(1, 500)])
        )
        began = time.monotonic()
        answers = asyncio.run(streams(server.port, [greedy(k % 2, 500) for k in range(64)]))
        took = time.monotonic() - began
        assert all(answer.done and not answer.error for answer in answers)
        assert [answer.text for answer in answers] == [alone[k % 2].text for k in range(64)]
        preemptions = server.metric("num_preemptions_total")
        assert preemptions > 10
        wait_for(server.is_idle)
    say("sixty-four sequences, room for a few", preemptions=preemptions, seconds=took)
