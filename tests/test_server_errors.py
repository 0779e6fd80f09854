"""What is wrong gets an error of one shape that names the field and the fix, and the server goes on."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.errors import ConfigError
from polymoe.server.app import create_app
from polymoe.server.serve import check_address, run_server
from polymoe.server.settings import ServerSettings
from servers import CONTEXT, ThreadServer, engine_config, events, make_bundle

COMPLETION = {"model": "base", "prompt": "the fox", "max_tokens": 2}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    config = engine_config(
        make_bundle(tmp_path_factory.mktemp("server")), max_num_seqs=4, max_waiting=4, slo={"interactive": 5.0}
    )
    with ThreadServer(config, max_body_bytes=100_000) as server:
        yield server


def check(response: httpx.Response, status: int, param: str | None, code: str) -> str:
    """The body is exactly the error; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["param"], body["error"]["code"]) == (param, code), body
    message: str = body["error"]["message"]
    assert len(message) < 500
    assert "/" not in message.replace("/v1/completions", "").replace("application/json", ""), "no paths"
    return message


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt.1", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt.1", "invalid_type"),
        ({"prompt": [[1], [[2]]]}, "prompt.1.0", "invalid_type"),
        ({"prompt": [112]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt.0", "invalid_value"),
        ({"prompt": [10**30]}, "prompt.0", "invalid_value"),
        ({"prompt": ["a"] * 257}, "prompt", "invalid_value"),
        ({"prompt": "a\ud800"}, "prompt", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": float("inf")}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"min_p": 1.1}, "min_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 2.5}, "max_tokens", "invalid_type"),
        ({"min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"n": 65}, "n", "invalid_value"),
        ({"n": 10**40}, "n", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": ["x" * 513]}, "stop.0", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop.0", "invalid_type"),
        ({"stop_token_ids": [500]}, "stop_token_ids", "invalid_value"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"500": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"priority": 1001}, "priority", "invalid_value"),
        ({"priority": -1001}, "priority", "invalid_value"),
        ({"priority": "high"}, "priority", "invalid_type"),
        ({"slo_class": "fast"}, "slo_class", "invalid_value"),
        ({"slo_class": ""}, "slo_class", "invalid_value"),
        ({"slo_class": "x" * 65}, "slo_class", "invalid_value"),
        ({"slo_class": 1}, "slo_class", "invalid_type"),
        ({"user": 5}, "user", "invalid_type"),
        ({"user": "u" * 513}, "user", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "unknown_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"x" * 5000: 1}, "x" * 200, "unknown_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "invalid_value"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds", "unsupported_parameter"),
        ({"echo": True, "logprobs": 1, "n": 2, "stream": True}, "stream", "invalid_value"),
        ({"max_tokens": CONTEXT}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * CONTEXT}, "prompt", "context_length_exceeded"),
        ({"n": 5}, "n", "invalid_value"),
        ({"prompt": ["a"] * 5}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 3, "n": 2}, "n", "invalid_value"),
    ],
)
def test_wrong_completions(server: ThreadServer, change: dict[str, Any], param: str, code: str) -> None:
    body = json.dumps({**COMPLETION, **change})  # json.dumps writes NaN and lone surrogates, httpx would not
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=60)
    if len(param) > 100:
        assert len(response.text) < 1000
    else:
        check(response, 400, param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_type"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages.0.x", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
            "messages.0.content.0.type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "x", "text": "a"}]}]},
            "messages.0.content.0.type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.type",
            "missing_required_parameter",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        ({"max_tokens": CONTEXT}, "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_wrong_chats(server: ThreadServer, change: dict[str, Any], param: str, code: str) -> None:
    check(server.post("/v1/chat/completions", {**CHAT, **change}), 400, param, code)


def test_what_asks_for_nothing_is_accepted(server: ThreadServer) -> None:
    nulls = dict.fromkeys(
        ("tools", "stop", "n", "seed", "logit_bias", "stream_options", "user", "functions", "temperature")
    )
    more = {"response_format": {"type": "text"}, "tool_choice": "none", "store": False, "metadata": {"a": "b"}}
    assert server.post("/v1/chat/completions", {**CHAT, **nulls, **more}).status_code == 200
    assert server.post("/v1/completions", {**COMPLETION, "best_of": 1, "suffix": None}).status_code == 200


def test_what_is_echoed_is_cut(server: ThreadServer) -> None:
    for wrong in ("y" * 50_000, [["y"] * 3000] * 5, {"a": "y" * 9000}):
        message = check(server.post("/v1/completions", {**COMPLETION, "n": wrong}), 400, "n", "invalid_type")
        assert "yyy" in message or "'y'" in message
    many = server.post("/v1/completions", {**COMPLETION, "prompt": [1.5] * 20_000})
    check(many, 400, "prompt.0", "invalid_type")


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[1]", b"5", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"n":' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object(server: ThreadServer, content: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_urls_and_methods(server: ThreadServer) -> None:
    check(httpx.get(f"{server.url}/v1/nothing"), 404, None, "not_found")
    check(httpx.get(f"{server.url}/v1/completions"), 405, None, "method_not_allowed")
    message = check(httpx.get(f"{server.url}/v1/models/other"), 404, "model", "model_not_found")
    assert "base, v1" in message
    check(server.post("/detokenize", {"model": "base", "tokens": [112]}), 400, "tokens", "invalid_value")
    check(server.post("/tokenize", {"model": "base"}), 400, "prompt", "invalid_value")


def test_openai_raises_a_class_for_each_status(server: ThreadServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def create(**change: Any) -> Any:
        return client.completions.create(**{**COMPLETION, **change})

    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4")
    assert missing.value.code == "model_not_found"
    assert "base, v1" in missing.value.message
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT} tokens") as long:
        create(prompt=[5] * CONTEXT)
    assert long.value.code == "context_length_exceeded"
    with server.full("base"), pytest.raises(openai.RateLimitError) as busy:
        create()
    assert int(busy.value.response.headers["Retry-After"]) >= 1
    assert busy.value.type == "rate_limit_error"


def test_an_unknown_slo_class_is_told_the_classes(server: ThreadServer) -> None:
    message = check(
        server.post("/v1/completions", {**COMPLETION, "slo_class": "fast"}), 400, "slo_class", "invalid_value"
    )
    assert "default, interactive" in message
    for fields in ({"slo_class": "interactive"}, {"slo_class": "default", "priority": -3, "user": "ann"}):
        assert server.post("/v1/completions", {**COMPLETION, **fields}).status_code == 200


def test_a_refused_request_is_counted(server: ThreadServer) -> None:
    def rejected() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(
            next(x for x in lines if x.startswith('polymoe:requests_rejected_total{model_name="v1"}')).split()[1]
        )

    before = rejected()
    with server.full("v1"):
        assert server.post("/v1/completions", {**COMPLETION, "model": "v1"}).status_code == 429
    assert rejected() == before + 1


def test_errors_that_come_before_a_stream_have_a_status(server: ThreadServer) -> None:
    check(
        server.post("/v1/completions", {**COMPLETION, "stream": True, "prompt": [112]}), 400, "prompt", "invalid_value"
    )
    with server.full("base"):
        assert server.post("/v1/completions", {**COMPLETION, "stream": True}).status_code == 429


def test_bodies_have_a_limit(server: ThreadServer) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 200_000, chunks()):
        response = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
        check(response, 413, None, response.json()["error"]["code"])
        assert "100000 bytes" in response.text


def test_an_error_in_mid_stream_is_an_event(server: ThreadServer) -> None:
    body = {**COMPLETION, "max_tokens": CONTEXT - 50, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        arriving = events(response)
        next(arriving)

        async def fail() -> None:
            from polymoe.errors import EngineDeadError

            server.client.fail_all(EngineDeadError("secret"))

        server.call(fail())
        *_, error, done = arriving
    assert done == "[DONE]"
    assert set(error) == {"error"}
    assert error["error"]["code"] == "engine_dead"
    assert "secret" not in error["error"]["message"]
    server.wait_for(server.is_idle)


def test_keys_and_loading(tmp_path: Path) -> None:
    """Without a started engine: probes answer, everything else needs the key, and what needs the engine is 503."""
    client = AsyncEngineClient(EngineConfig(bundle=str(tmp_path)))
    app = create_app(client, ServerSettings(api_key="sésame"))

    async def get(path: str, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get(path, headers=headers)  # type: ignore[arg-type]

    async def run() -> None:
        assert (await get("/health")).json() == {"status": "loading"}
        assert "starting" in check(await get("/ready"), 503, None, "loading")
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            for key in (None, "sesame", "sésame2"):
                check(await get(path, key), 401, None, "invalid_api_key")
        check(await get("/v1/models", "sésame"), 503, None, "loading")
        assert (await get("/metrics", "sésame")).status_code == 200
        app.state.server.draining = True
        check(await get("/v1/models", "sésame"), 503, None, "draining")
        client.dead.set()
        check(await get("/health"), 503, None, "engine_dead")

    asyncio.run(run())


def test_addresses_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    config = EngineConfig(bundle=str(tmp_path / "missing"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is in use; choose another with --port"):
            run_server(config, ServerSettings(port=port))
        with pytest.raises(ConfigError, match="is in use"):
            check_address(ServerSettings(port=port))
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-key-file"):
            check_address(ServerSettings(host=host, port=port))
    with pytest.raises(ConfigError, match="choose another with --host"):
        check_address(ServerSettings(host="192.0.2.1", port=port, api_key="key"))
    check_address(ServerSettings(port=port))
    check_address(ServerSettings(host="0.0.0.0", port=port, api_key="key"))
