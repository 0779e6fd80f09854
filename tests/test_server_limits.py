"""What clients may cost: long bodies, silent and slow connections, and readers that never read."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from polymoe.server.connection import raise_file_limit
from polymoe.text.chat_template import TemplateSource
from servers import CONTEXT, ThreadServer, engine_config, make_bundle, wait_for

LIMITS = {"header_timeout": 0.5, "write_timeout": 0.5, "max_connections": 40, "max_body_bytes_together": 8 << 20}
LIMITS["heartbeat_timeout"] = 2.0
STREAM = {"model": "base", "prompt": "the fox", "stream": True, "ignore_eos": True, "max_tokens": 300}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(make_bundle(tmp_path_factory.mktemp("limits"))), **LIMITS) as server:
        yield server


@contextlib.contextmanager
def longest_gap(server: ThreadServer) -> Iterator[list[float]]:
    """The longest time in seconds that the server's event loop, and so every stream, stood still meanwhile."""
    gaps = [0.0]

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.001)
            gaps[0] = max(gaps[0], time.monotonic() - last)
            last = time.monotonic()

    ticking = asyncio.run_coroutine_threadsafe(tick(), server.loop)
    time.sleep(0.02)
    try:
        yield gaps
    finally:
        ticking.cancel()


def send(server: ThreadServer, data: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(10)
    sock.sendall(data)
    return sock


def post(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def read_all(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            received += data
    return received


def error_of(response: bytes) -> tuple[int, Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# --- bodies


def large_bodies() -> dict[str, tuple[str, str, int]]:
    """name -> (path, body, status)."""
    words = json.dumps("hello world " * 325_000)
    many = ",".join(f'"{i}":""' for i in range(280_000))
    twice = many + ',"279999":""'
    return {
        "a long prompt": ("/v1/completions", f'{{"model":"base","prompt":{words},"max_tokens":1}}', 400),
        "a long batch": ("/v1/completions", f'{{"model":"base","prompt":[{words[:4000000]}"],"max_tokens":1}}', 400),
        "metadata": ("/v1/completions", f'{{"model":"base","prompt":"a","metadata":{{{many}}}}}', 400),
        "a name twice": ("/v1/completions", f'{{"model":"base","prompt":"a","metadata":{{{twice}}}}}', 400),
        "token ids": ("/v1/completions", f'{{"model":"base","prompt":[{"1," * 1_900_000}1]}}', 400),
        "a long chat": (
            "/v1/chat/completions", f'{{"model":"base","messages":[{{"role":"user","content":{words}}}]}}', 400
        ),
        "tokenize": ("/tokenize", f'{{"model":"base","prompt":{words},"return_token_strs":true}}', 200),
        "detokenize": ("/detokenize", f'{{"model":"base","tokens":[{"50," * 1_300_000}50]}}', 200),
    }  # fmt: skip


@pytest.mark.parametrize("name", large_bodies())
def test_a_large_body_stops_no_stream(server: ThreadServer, name: str) -> None:
    """4 MB of prompt stopped all streams for 3.4 s, to be refused then; 280,000 keys of metadata for 1.4 s, and for
    minutes if one of them came twice."""
    path, body, status = large_bodies()[name]
    headers = {"Content-Type": "application/json"}
    with longest_gap(server) as gaps:
        response = httpx.post(server.url + path, content=body, headers=headers, timeout=60)
    assert response.status_code == status, response.text[:300]
    if status == 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.content) < 1000
    assert gaps[0] < 0.4  # 0.13 s on a quiet machine, of reading two million numbers


def test_large_bodies_together_have_a_limit(server: ThreadServer) -> None:
    """100 unfinished bodies of nearly 4 MB held 365 MB; small requests go on beside them."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 4000000\r\n\r\n"
    )
    socks = [send(server, head) for _ in range(10)]
    process = psutil.Process()
    before = process.memory_info().rss
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.sendall(b" " * 3_500_000)
    refused = 0
    for sock in socks:
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError, ConnectionError):
            refused += b" 429 " in sock.recv(1000)
    assert refused >= 7
    assert process.memory_info().rss - before < 60 << 20
    small = server.post("/v1/completions", {"model": "base", "prompt": "the", "max_tokens": 1})
    assert small.status_code == 200
    for sock in socks:
        sock.close()
    wait_for(lambda: server.state.in_flight == 0)
    large = {"model": "base", "prompt": "the " * 100_000}
    assert server.post("/v1/completions", large).status_code == 400  # what they held is free again


# --- connections


def test_silent_connections_end(server: ThreadServer) -> None:
    """Silent sockets stayed for ever, and so did those that sent a part of a head, or of a second one."""
    whole = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    begun = time.monotonic()
    socks = [send(server, data) for data in (b"", b"GET /version HT", whole + b"GET /ver")]
    for sock in socks:
        read_all(sock)
    assert time.monotonic() - begun < 3


def test_idle_connections_make_room(server: ThreadServer) -> None:
    """With 256 files, 400 silent sockets made the server unreachable, and wrote 53,280 lines of log."""
    socks = [send(server, b"") for _ in range(60)]
    try:
        for _ in range(3):
            assert httpx.get(f"{server.url}/version").status_code == 200
    finally:
        for sock in socks:
            sock.close()


def test_where_all_connections_work_new_ones_are_told(server: ThreadServer) -> None:
    body = json.dumps({**STREAM, "max_tokens": CONTEXT - 20}).encode()
    socks = [send(server, post(body)) for _ in range(40)]
    for sock in socks:
        assert b" 200 " in sock.recv(20)
    extra = socket.create_connection(("127.0.0.1", server.port))
    status, error = error_of(read_all(extra))
    assert (status, error["code"]) == (503, "too_many_connections")
    for sock in socks:
        sock.close()
    wait_for(server.is_idle)
    assert httpx.get(f"{server.url}/version").status_code == 200


def test_clients_that_never_read_are_given_up(server: ThreadServer) -> None:
    """200 of them held 100 MB for good."""
    body = json.dumps({**STREAM, "n": 16, "logprobs": 20, "max_tokens": CONTEXT - 20}).encode()
    socks = []
    for _ in range(2):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(post(body))
        socks.append(sock)
    wait_for(lambda: len(server.client.open_streams) == 2)
    wait_for(lambda: not server.client.open_streams, timeout=60)
    wait_for(server.is_idle)
    assert server.state.in_flight == 0
    for sock in socks:
        sock.close()


def test_the_limit_of_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert raise_file_limit() == min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000, 431),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: zip\r\n\r\n", 501),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    ],
)
def test_what_is_no_http_gets_an_error_like_all_others(server: ThreadServer, data: bytes, status: int) -> None:
    """They were plain text."""
    got, error = error_of(read_all(send(server, data)))
    assert got == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_http"


def test_the_rest_of_a_refused_body_is_not_waited_for(server: ThreadServer) -> None:
    sock = send(server, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\nx")
    begun = time.monotonic()
    status, _ = error_of(read_all(sock))
    assert status == 413
    assert time.monotonic() - begun < 8


# --- panics and stops


def test_an_idle_engine_that_hangs_is_noticed(server: ThreadServer) -> None:
    """A stopped engine without work looked healthy."""
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.client.pid is not None
    os.kill(server.client.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503, timeout=10)
        assert httpx.get(f"{server.url}/health").json()["error"]["code"] == "engine_stuck"
    finally:
        os.kill(server.client.pid, signal.SIGCONT)
    wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200, timeout=10)


def test_a_panic_in_the_tokenizer_is_an_error_of_its_request(
    server: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed assertions in Rust are no `Exception`."""

    class PanicException(BaseException):
        pass

    class Broken:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise PanicException("index out of bounds")

    tokenizer = server.client.processor.require_tokenizer("base", "this test")
    monkeypatch.setattr(tokenizer, "_rust", Broken())
    for prompt in ("the", "the " * 2000):
        response = server.post("/v1/completions", {"model": "base", "prompt": prompt, "max_tokens": 1})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
    monkeypatch.undo()
    monkeypatch.setattr(server.state.encoder, "encode", lambda *_: (_ for _ in ()).throw(PanicException()))
    response = server.post("/v1/completions", {"model": "base", "prompt": "the", "max_tokens": 1})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


def test_a_hostile_template_stops_nobody(server: ThreadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten chats with it ended the service for all variants, also after the clients had left."""
    hostile = TemplateSource("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    monkeypatch.setattr(server.client.processor.require_tokenizer("v1", "this test"), "template_source", hostile)
    chat = {"model": "v1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    leaving = [threading.Thread(target=_leave, args=(server, chat)) for _ in range(10)]
    for thread in leaving:
        thread.start()
    with longest_gap(server) as gaps:
        begun = time.monotonic()
        assert server.post("/v1/chat/completions", {**chat, "model": "base"}).status_code == 200
        assert time.monotonic() - begun < 2.5
    assert gaps[0] < 0.4
    for thread in leaving:
        thread.join()
    wait_for(lambda: server.state.in_flight == 0, timeout=5)
    response = server.post("/v1/chat/completions", chat)
    assert response.status_code == 400
    assert "too long" in response.json()["error"]["message"]


def _leave(server: ThreadServer, chat: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=0.5)
