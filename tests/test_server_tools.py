"""Tools, reasoning and the fields of prompts, through the real openai client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from polymoe.errors import ConfigError
from polymoe.server.settings import ServerSettings
from servers import CONTEXT, ThreadServer, engine_config, events
from tool_bundle import make_tool_bundle

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ASK: Any = [{"role": "user", "content": "the fox"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tool_bundle(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ThreadServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, model: str = "base", **fields: Any) -> Any:
    fields = {"messages": ASK, "temperature": 0, "max_tokens": 200} | fields
    return client.chat.completions.create(model=model, **fields)


def checked(call: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = json.loads(call.function.arguments)
    assert call.type == "function"
    assert call.id
    if call.function.name == "get_weather":
        assert arguments["city"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9
    return arguments


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    choice = ask(client, tools=[NOW, WEATHER], tool_choice=named).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    checked(call)


@pytest.mark.parametrize("model", ["base", "v1"])
def test_some_tool_is_called_and_streams(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    fields |= {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    whole = ask(client, model, **fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    found = checked(call)
    name, arguments, reasons, parts = "", "", [], 0
    for chunk in ask(client, model, stream=True, **fields):
        delta = chunk.choices[0].delta
        assert not delta.content
        for piece in delta.tool_calls or ():
            assert piece.index == 0
            name += piece.function.name or ""
            arguments += piece.function.arguments
            parts += bool(piece.function.arguments)
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, json.loads(arguments)) == ("get_weather", found)
    assert parts > 2
    assert reasons[-1] == "tool_calls"


def test_the_model_may_call_by_itself(client: openai.OpenAI) -> None:
    """With `auto` the text decides; a structured output makes the model of the tests write what it is to write."""
    written = {"structured_outputs": {"choice": ["I look. " + CALL + "\n" + CALL]}}
    message = ask(client, tools=[WEATHER], extra_body=written).choices[0].message
    assert message.content == "I look. "
    assert [checked(call) for call in message.tool_calls] == [{"city": "Rome", "days": 2}] * 2
    one = ask(client, tools=[WEATHER], parallel_tool_calls=False, extra_body=written).choices[0]
    assert len(one.message.tool_calls) == 1
    assert one.finish_reason == "tool_calls"
    none = ask(client, tools=[WEATHER], tool_choice="none", extra_body=written).choices[0]
    assert none.message.tool_calls is None
    assert none.message.content.count("<tool_call>") == 2
    assert none.finish_reason == "stop"


def test_calls_and_their_results_go_through_the_template(client: openai.OpenAI, server: ThreadServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = server.post("/tokenize", {"model": "base", "messages": turns, "tools": [WEATHER]}).json()
    text = server.post("/detokenize", {"model": "base", "tokens": answer["tokens"]}).json()["prompt"]
    assert '"description": "Weather of a city"' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>[Hm.]' in text
    assert "<tool>sunny" in text
    assert ask(client, messages=turns, tools=[WEATHER], max_tokens=3).usage.prompt_tokens == answer["count"]


def test_reasoning_is_split_off(client: openai.OpenAI, server: ThreadServer) -> None:
    """The prompt of `v1` begins it; what the answer has to look like begins after it."""
    wanted = {"structured_outputs": {"choice": ["yes", "no"]}}
    body = {"model": "v1", "messages": ASK, "temperature": 0, "max_tokens": 500}
    plain = ask(client, "v1", max_tokens=5).choices[0].message
    assert plain.content == ""
    assert plain.reasoning == plain.reasoning_content
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    message = ask(client, "v1", extra_body=wanted | closed).choices[0].message
    assert message.content in ("yes", "no")
    assert message.reasoning is None
    free = server.post("/v1/chat/completions", {**body, **wanted, "max_tokens": 40, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in events(free) if event != "[DONE]"]
    assert all(not delta.get("content") for delta in deltas)
    assert "".join(delta.get("reasoning") or "" for delta in deltas)


def test_effort_reaches_the_template(server: ThreadServer) -> None:
    for fields in ({"reasoning_effort": "low"}, {"chat_template_kwargs": {"effort": "low"}}):
        with_it = server.post("/v1/chat/completions", {"model": "base", "messages": ASK, "max_tokens": 1, **fields})
        without = server.post("/v1/chat/completions", {"model": "base", "messages": ASK, "max_tokens": 1})
        assert with_it.json()["usage"]["prompt_tokens"] != without.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        ("v2", {"tools": [NOW]}, "tools"),
        ("base", {"tool_choice": "required"}, "tool_choice"),
        ("base", {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ("base", {"tools": [NOW, NOW]}, "tools"),
        ("base", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            "base",
            {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        (
            "base",
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}]},
            "tools",
        ),
        ("base", {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ("base", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ("base", {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ("base", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("base", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (
            "base",
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}],
            },
            "tools",
        ),
    ],
)
def test_what_is_wrong_is_named(server: ThreadServer, model: str, fields: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", {"model": model, "messages": ASK, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_fields_of_prompts(server: ThreadServer) -> None:
    """`return_token_ids`, `prompt_logprobs`, `truncate_prompt_tokens`: as in vLLM."""
    body = {"model": "base", "prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}
    asked = {"return_token_ids": True, "prompt_logprobs": 2}
    choice = server.post("/v1/completions", {**body, **asked}).json()["choices"][0]
    tokens = server.post("/tokenize", {"model": "base", "prompt": body["prompt"]}).json()["tokens"]
    assert choice["prompt_token_ids"] == tokens
    assert len(choice["token_ids"]) == 4
    assert choice["prompt_logprobs"][0] is None
    for token, entry in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True):
        assert entry[str(token)]["logprob"] < 0
        assert 2 <= len(entry) <= 3
    cut = {**body, "truncate_prompt_tokens": 2, "return_token_ids": True}
    assert server.post("/v1/completions", cut).json()["choices"][0]["prompt_token_ids"] == tokens[-2:]
    long = {**body, "prompt": tokens * 400, "truncate_prompt_tokens": -1}
    assert server.post("/v1/completions", long).json()["usage"]["prompt_tokens"] == CONTEXT - 4
    chat = {"model": "base", "messages": ASK, "max_tokens": 3, **asked}
    answer = server.post("/v1/chat/completions", chat).json()
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]
    stream = {**chat, "stream": True, "prompt_logprobs": None}
    chunks = [event for event in events(server.post("/v1/chat/completions", stream)) if event != "[DONE]"]
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert len([token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]) == 3


def test_a_final_message_goes_on(server: ThreadServer) -> None:
    turns = [*ASK, {"role": "assistant", "content": "Well,"}]

    def text(**fields: Any) -> str:
        tokens = server.post("/tokenize", {"model": "base", "messages": turns, **fields}).json()["tokens"]
        found: str = server.post("/detokenize", {"model": "base", "tokens": tokens}).json()["prompt"]
        return found

    assert text(continue_final_message=True).endswith("<assistant>Well,")
    assert text(add_generation_prompt=False).endswith("<assistant>Well,")
    assert text().endswith("<assistant>Well,<assistant>")
    answer = server.post(
        "/v1/chat/completions", {"model": "base", "messages": turns, "continue_final_message": True, "max_tokens": 2}
    )
    assert answer.status_code == 200, answer.text


def test_the_operator_may_say_the_format() -> None:
    assert ServerSettings(tool_parsers=("a=b=hermes",)).tool_parser_of("a=b") == "hermes"
    with pytest.raises(ConfigError, match="there is no variant a=b; there are x"):
        ServerSettings(tool_parsers=("a=b=hermes",)).check_variants(["x"])
    for wrong in ("hermes", "a=nothing", "=hermes"):
        with pytest.raises(ConfigError, match="tool-parser"):
            ServerSettings(tool_parsers=(wrong,))
