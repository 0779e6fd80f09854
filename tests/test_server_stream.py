"""Streamed answers on their shortest way: what is written at once is what the long way writes."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from polymoe.client.output_sequence import CompletionChunk
from polymoe.server.answers import AnswerFormat, AnswerReader
from polymoe.server.format import Format
from polymoe.server.protocol import ChatCompletionRequest, CompletionRequest
from polymoe.server.responses import ChatFormat, CompletionFormat
from polymoe.server.tally import TallyHistogram
from polymoe.text.reasoning import ReasoningMarks
from polymoe.text.tools.base import ToolParser
from polymoe.text.tools.hermes import HermesParser
from servers import CONTEXT, ThreadServer, engine_config, make_bundle

MARKS = ReasoningMarks("<think>", "</think>")
ASK = [{"role": "user", "content": "the fox"}]
CALL = '<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'
CHUNKS = [
    CompletionChunk("id", 0, 0, 'a \n"quoted" \\ text \u2028', [5], num_cached_tokens=2),
    CompletionChunk("id", 0, 1, "", [6]),
    CompletionChunk("id", 0, 1, "\x00 é 漢 </s>", [6, 7]),
    CompletionChunk("id", 0, 1, "<think>", [6]),
    CompletionChunk("id", 0, 0, f"\n{CALL[:30]}", [6]),
    CompletionChunk("id", 0, 0, f"{CALL[30:]} and text", [6]),
    CompletionChunk("id", 0, 0, "</think>\n\nwell", [6]),
    CompletionChunk("id", 0, 0, "end", [8], finish_reason="length"),
    CompletionChunk("id", 0, 1, "end", [8], finish_reason="stop", stop_reason="x"),
]


def chat(
    marks: ReasoningMarks | None = None, parser: type[ToolParser] | None = None, is_open: bool = False, **fields: Any
) -> Format:
    body = ChatCompletionRequest.model_validate(
        {"model": 'a "model"', "messages": ASK, "stream": True, "n": 2} | fields
    )
    answers = AnswerFormat(parser=parser, tools={"look": {}}, marks=marks, is_open=is_open)
    return ChatFormat("chatcmpl-1", body, [(None, [1, 2, 3])], None, answers)


def completion(**fields: Any) -> Format:
    body = CompletionRequest.model_validate({"model": "base", "prompt": [1, 2], "stream": True, "n": 2} | fields)
    return CompletionFormat("cmpl-1", body, [(None, [1, 2])], None)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, {"return_token_ids": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "make",
    [
        chat, completion, lambda **f: chat(MARKS, **f), lambda **f: chat(MARKS, is_open=True, **f),
        lambda **f: chat(None, HermesParser, **f), lambda **f: chat(MARKS, HermesParser, is_open=True, **f),
    ],
)  # fmt: skip
def test_a_chunk_is_the_same_on_both_ways(make: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnswerReader, "call_id", lambda _: "call_1")
    short, long = make(**fields), make(**fields)
    long._created = short._created
    for chunk in CHUNKS:
        events = b"".join(map(long.event, long.chunks(chunk)))
        assert short.encoded(chunk) == events
        for event in events.removesuffix(b"\n\n").split(b"\n\n"):
            json.loads(event.removeprefix(b"data: "))
    assert short.closing() == long.closing()


def test_a_tally_looks_like_prometheus_own() -> None:
    bounds = (0.001, 0.0025, 1, 10)
    texts = []
    for values in ([], [0.001, 0.002, 0.5, 1, 99, 1.5, 0.0025]):
        ours, theirs = CollectorRegistry(), CollectorRegistry()
        tally = TallyHistogram("vllm:x_seconds", "A text.", bounds)
        ours.register(tally)
        histogram = Histogram("vllm:x_seconds", "A text.", ["model_name"], registry=theirs, buckets=bounds)
        for model in ("a", "b"):
            for value in values:
                tally.labels(model).observe(value)
                histogram.labels(model).observe(value)
        texts.append((generate_latest(ours), generate_latest(theirs)))
    for found, wanted in texts:
        assert found == wanted


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(make_bundle(tmp_path_factory.mktemp("stream")))) as server:
        yield server


def ask(server: ThreadServer, version: str, body: dict[str, Any], pause: float = 0.0) -> tuple[bytes, bytes]:
    """(head, body) of a stream that is read slowly, over a connection with small buffers."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    sock.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    received = b""
    while data := sock.recv(1 << 12):
        received += data
        time.sleep(pause)
    sock.close()
    before, _, after = received.partition(b"\r\n\r\n")
    return before, after


def test_a_slow_reader_gets_all_of_it_in_its_order(server: ThreadServer) -> None:
    """Where writing has to wait, what comes meanwhile waits behind it."""
    body = {"model": "base", "prompt": "the", "max_tokens": CONTEXT - 20, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/completions", body).json()["choices"][0]
    _, sent = ask(server, "1.0", {**body, "stream": True, "user": "u" * 500, "n": 1}, pause=0.002)
    events = [line.removeprefix("data: ") for line in sent.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == "length"


def test_older_and_newer_clients(server: ThreadServer) -> None:
    """HTTP/1.0 knows no chunks; in 1.1 they have to add up."""
    body = {"model": "base", "prompt": "the", "max_tokens": 30, "temperature": 0, "ignore_eos": True, "stream": True}
    old_head, old = ask(server, "1.0", body)
    new_head, new = ask(server, "1.1", body)
    assert b"chunked" not in old_head
    assert b"chunked" in new_head
    joined = b""
    while new:
        size, _, rest = new.partition(b"\r\n")
        joined, new = joined + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        assert rest[int(size, 16) : int(size, 16) + 2] == b"\r\n"

    def texts(sent: bytes) -> list[str]:
        lines = [line.removeprefix(b"data: ") for line in sent.split(b"\n\n") if line]
        assert lines.pop() == b"[DONE]"
        return [json.loads(line)["choices"][0]["text"] for line in lines]

    assert texts(old) == texts(joined)
    assert len(texts(old)) == 30
