"""Clients for vLLM or OpenAI send every field they know: at its default it is accepted, in use it is refused."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from polymoe.server.json_body import InvalidJsonError, parse_json
from polymoe.server.known_fields import OF_GENERATION, OF_TOKENIZING, asks_for_nothing
from polymoe.server.protocol import ChatCompletionRequest, CompletionRequest
from polymoe.server.tokenize_request import TokenizeRequest
from servers import ThreadServer, engine_config, make_bundle

COMPLETION = {"model": "base", "prompt": "the fox", "max_tokens": 2}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}

# Fields of vLLM's request classes and of openai-python's, at their defaults.
DEFAULTS: dict[str, Any] = {
    "frequency_penalty": 0.0, "logit_bias": {}, "n": 1, "best_of": 1, "presence_penalty": 0, "seed": None, "stop": [],
    "stream": False, "temperature": 1, "top_p": 1.0, "user": "ann", "use_beam_search": False, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "length_penalty": 1, "stop_token_ids": [], "include_stop_str_in_output": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None, "allowed_token_ids": None, "prompt_logprobs": None, "bad_words": [],
    "response_format": {"type": "text"}, "structured_outputs": None, "guided_json": None, "guided_regex": None,
    "guided_choice": None, "guided_grammar": None, "logits_processors": None, "priority": 0, "request_id": None,
    "return_tokens_as_token_ids": False, "return_token_ids": None, "cache_salt": None, "kv_transfer_params": None,
    "vllm_xargs": None, "stream_interval": None, "echo": False, "prompt_cache_key": "key",
    "prompt_cache_retention": "in_memory", "prompt_cache_options": {"mode": "implicit"}, "safety_identifier": "ann",
    "parallel_tool_calls": True, "verbosity": "medium", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
    "reasoning_effort": None, "tool_choice": "none", "tools": [], "modalities": ["text"], "prediction": None,
    "include_reasoning": True, "thinking_token_budget": None, "watermarking": None, "session_id": "s",
}  # fmt: skip
CHAT_DEFAULTS: dict[str, Any] = {
    "logprobs": False, "top_logprobs": 0, "max_completion_tokens": None, "add_generation_prompt": True,
    "continue_final_message": False, "add_special_tokens": False, "documents": None, "chat_template": None,
    "media_io_kwargs": None, "mm_processor_kwargs": None,
}  # fmt: skip
COMPLETION_DEFAULTS: dict[str, Any] = {"logprobs": None, "suffix": None, "add_special_tokens": True}
CLASSES: dict[str, type[CompletionRequest] | type[ChatCompletionRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
FIELDS = {
    "/v1/completions": {**DEFAULTS, **COMPLETION_DEFAULTS},
    "/v1/chat/completions": {**DEFAULTS, **CHAT_DEFAULTS},
}

# The same fields, asking for something that this server does not do.
ACTIVE: dict[str, Any] = {
    "use_beam_search": True, "length_penalty": 0.9, "spaces_between_special_tokens": False,
    "guided_json": {},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a", "logits_processors": ["m.f"],
    "request_id": "mine", "return_tokens_as_token_ids": True, "kv_transfer_params": {},
    "vllm_xargs": {"a": 1}, "stream_interval": 2, "verbosity": "low", "watermarking": True, "modalities": ["audio"],
    "thinking_token_budget": 5, "functions": [{"name": "f"}], "echo": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(make_bundle(tmp_path_factory.mktemp("fields")))) as server:
        yield server


def error_of(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 400, response.text
    error: dict[str, str] = response.json()["error"]
    return error


@pytest.mark.parametrize("path", list(FIELDS))
def test_defaults_and_nulls_are_accepted(server: ThreadServer, path: str) -> None:
    """Clients send `use_beam_search: false`, `length_penalty: 1.0` …; each of them was refused as unknown."""
    for fields in (FIELDS[path], dict.fromkeys(FIELDS[path])):
        response = server.post(path, {**fields, **BODIES[path]})
        assert response.status_code == 200, response.text
        for name, value in fields.items():  # none of them needs another one
            CLASSES[path].model_validate({**BODIES[path], name: value})


@pytest.mark.parametrize("path", list(FIELDS))
def test_what_is_in_use_is_refused_by_name(server: ThreadServer, path: str) -> None:
    for name, value in ACTIVE.items():
        if name == "echo" and path == "/v1/completions":
            continue  # implemented there
        error = error_of(server.post(path, {**BODIES[path], name: value}))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter"), error
        assert "null" in error["message"], "it says what would be accepted"


def test_each_unsupported_field_has_values_that_ask_for_nothing() -> None:
    tokenize = {"model": "base", "messages": CHAT["messages"]}
    cases = ((OF_GENERATION, ChatCompletionRequest, CHAT), (OF_TOKENIZING, TokenizeRequest, tokenize))
    for known, request, body in cases:
        for name, values in known.items():
            assert None in values
            for value in values:
                request.model_validate({**body, name: value})


def test_true_is_not_one() -> None:
    assert asks_for_nothing(1.0, (None, 1))
    assert not asks_for_nothing(True, (None, 1))
    assert not asks_for_nothing(0, (None, False))
    assert asks_for_nothing({"type": "text"}, (None, {"type": "text"}))


def test_options_of_streams(server: ThreadServer) -> None:
    for path, body in BODIES.items():
        for options in ({"include_obfuscation": False}, {"include_obfuscation": None, "include_usage": True}):
            assert server.post(path, {**body, "stream": True, "stream_options": options}).status_code == 200
        wrong = {**body, "stream": True, "stream_options": {"include_obfuscation": True}}
        error = error_of(server.post(path, wrong))
        assert error["param"] == "stream_options.include_obfuscation"


def test_a_seed_of_minus_one_is_none(server: ThreadServer) -> None:
    """vLLM's meaning: clients that always send a seed write -1 for "random". It used to be a seed like any other."""

    def text(path: str, seed: int) -> str:
        fields = {"temperature": 5.0, "max_tokens": 24, "ignore_eos": True, "seed": seed}
        choice = server.post(path, {**BODIES[path], **fields}).json()["choices"][0]
        found: str = choice["text"] if "text" in choice else choice["message"]["content"]
        return found

    for path in BODIES:
        assert text(path, -2) == text(path, -2)
        assert text(path, -1) != text(path, -1)


def test_special_tokens_around_prompts_and_chats(server: ThreadServer) -> None:
    """add_special_tokens was accepted beside messages, and ignored; null was refused."""
    for prompt_option in (None, True, False):
        body = {"model": "base", "prompt": "the fox", "add_special_tokens": prompt_option}
        assert server.post("/tokenize", body).status_code == 200
    chat = {"model": "base", "messages": CHAT["messages"]}
    assert server.post("/tokenize", {**chat, "add_special_tokens": False}).status_code == 200
    assert error_of(server.post("/tokenize", {**chat, "add_special_tokens": True}))["param"] == "add_special_tokens"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}},
        {"type": "image"},
    ],
)
def test_only_text_is_read(server: ThreadServer, part: dict[str, Any]) -> None:
    """An image was refused as an unrecognized argument `image_url`, as if it were misspelt."""
    for path in ("/v1/chat/completions", "/tokenize"):
        content = [{"type": "text", "text": "what is this?"}, part]
        body = {"model": "base", "messages": [{"role": "user", "content": content}]}
        error = error_of(server.post(path, body))
        assert error["param"] == "messages.0.content.1.type"
        assert "only text" in error["message"]
        assert part["type"] in error["message"]


def test_a_context_error_names_the_field_of_its_api(server: ThreadServer) -> None:
    error = error_of(server.post("/v1/completions", {**COMPLETION, "prompt": [5] * 2000}))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "in the prompt" in error["message"]
    for limit in ({}, {"max_tokens": None}):
        long = {**CHAT, "messages": [{"role": "user", "content": "fox " * 2000}], **limit}
        error = error_of(server.post("/v1/chat/completions", long))
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        assert "in the messages" in error["message"]


def test_a_batch_that_can_never_fit_is_wrong_and_not_early(server: ThreadServer) -> None:
    """It was answered 429 with Retry-After, and clients tried again for ever."""
    most = server.client.config.max_waiting
    body = {**COMPLETION, "prompt": ["fox"] * 256, "n": most // 256 + 1, "max_tokens": 1}
    response = server.post("/v1/completions", body)
    assert error_of(response)["param"] == "n"
    assert str(most) in response.text
    assert "Retry-After" not in response.headers
    fits = server.post("/v1/completions", {**body, "n": most // 256})
    assert fits.status_code == 200
    assert len(fits.json()["choices"]) == most


def send(server: ThreadServer, path: str, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json", **headers})


def test_duplicate_names_are_refused(server: ThreadServer) -> None:
    """Of two values Python takes the last, a proxy in front (which may check `model`) perhaps the first."""
    twice = b'{"model": "base", "prompt": "a", "max_tokens": 1, "model": "v1"}'
    error = error_of(send(server, "/v1/completions", twice))
    assert (error["param"], error["code"]) == ("model", "invalid_json")
    nested = b'{"model": "base", "messages": [{"role": "user", "content": "a", "role": "system"}]}'
    assert error_of(send(server, "/v1/chat/completions", nested))["param"] == "role"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "n", "max_tokens", "seed", "presence_penalty", "length_penalty", "priority"]
)
def test_numbers_that_are_none(server: ThreadServer, number: str, field: str) -> None:
    body = json.dumps({**COMPLETION, field: "?"}).replace('"?"', number)
    assert error_of(send(server, "/v1/completions", body.encode()))["param"] == field
    bias = json.dumps({**COMPLETION, "logit_bias": {"5": "?"}}).replace('"?"', number)
    assert error_of(send(server, "/v1/completions", bias.encode()))["param"] == "logit_bias.5"


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/completions", {"model": "\ud800"}, "model"),
        ("/v1/completions", {"prompt": "a\udfff"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "\ud800"]}, "prompt.1"),
        ("/v1/completions", {"stop": ["\ud800"]}, "stop.0"),
        ("/v1/completions", {"user": "\ud800"}, "user"),
        ("/v1/completions", {"cache_salt": "\ud800"}, "cache_salt"),
        ("/v1/completions", {"slo_class": "\ud800"}, "slo_class"),
        ("/v1/completions", {"metadata": {"a": "\ud800"}}, "metadata.a"),
        ("/v1/completions", {"logit_bias": {"\ud800": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "\ud83d \ude00"}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": ""}]}, "messages.0.role"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
    ],
)
def test_half_a_surrogate_pair_is_no_character(
    server: ThreadServer, path: str, change: dict[str, Any], param: str
) -> None:
    """A tenant (`user`) of this kind reached msgspec, which cannot encode it: 500."""
    body = {**BODIES.get(path, {"model": "base"}), **change}
    error = error_of(send(server, path, json.dumps(body).encode()))
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert "surrogate" in error["message"]


def test_whole_pairs_are_characters(server: ThreadServer) -> None:
    body = json.dumps({**COMPLETION, "prompt": "fox 😀", "echo": True, "max_tokens": 0})
    assert "\\ud83d\\ude00" in body
    assert send(server, "/v1/completions", body.encode()).json()["choices"][0]["text"] == "fox 😀"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"a": "\xff"}', "UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": 1', "at character 7"),
        (b"{'a': 1}", "at character 1"),
        (b'{"a": 1,}', "JSON"),
        (b'{"a": [1, {"b": 2, "b": 3}]}', "names b twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_what_is_no_json(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidJsonError, match=reason) as refused:
        parse_json(body)
    assert refused.value.status_code == 400


def test_json_is_read_as_it_stands() -> None:
    value = {"a": [1, 2.5, None, True, {"b": "ü😀"}], "": {}}
    for body in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(body.encode()) == value
    deep: Any = parse_json(b"[" * 200 + b"]" * 200)
    assert deep[0][0][0]


def test_deep_nesting_inside_a_field(server: ThreadServer) -> None:
    for depth in (200, 700, 50_000):
        for name in ("prompt", "stop", "metadata", "tools", "unknown"):
            nested = "[" * depth + "]" * depth
            body = json.dumps({**COMPLETION, name: "?"}).replace('"?"', nested).encode()
            assert len(error_of(send(server, "/v1/completions", body))["message"]) < 600


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types_are_refused(server: ThreadServer, kind: str) -> None:
    """A web page may send these to a server on its reader's machine without asking (no preflight)."""
    headers = {"Content-Type": kind} if kind else {}
    response = httpx.post(f"{server.url}/v1/completions", content=json.dumps(COMPLETION).encode(), headers=headers)
    assert "Content-Type: application/json" in error_of(response)["message"]
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert send(server, "/v1/completions", json.dumps(COMPLETION).encode(), **charset).status_code == 200
