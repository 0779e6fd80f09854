"""The Responses and the Messages API: the same generation as a chat, read by OpenAI's and Anthropic's clients."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from polymoe.server.schemas import ErrorResponse
from polymoe.server.turn_schemas import MessageObject, MessagesErrorResponse, ResponsesObject, TokenCount
from servers import ThreadServer, engine_config
from test_server_tools import ASK, CALL, WEATHER, bundle  # noqa: F401  (a fixture)

FUNCTION: Any = {"type": "function", **WEATHER["function"]}
TOOL: Any = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}
GREEDY: Any = {"temperature": 0}  # which anthropic has no argument for
EXACT: Any = {"model": "base", "max_output_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ThreadServer]:  # noqa: F811
    with ThreadServer(engine_config(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ThreadServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: ThreadServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "base", "max_tokens": 12, "temperature": 0, "messages": ASK, **options}
    return client.chat.completions.create(**options)


# --- Responses


def test_a_response_is_the_chat(client: openai.OpenAI) -> None:
    """Instructions are the system message; the answer and its usage are those of the same chat."""
    response = client.responses.create(**EXACT, input="the fox", instructions="Be short.")
    same = chat(client, messages=[{"role": "system", "content": "Be short."}, *ASK])
    assert response.output_text == same.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.input_tokens == same.usage.prompt_tokens
    assert response.usage.output_tokens == same.usage.completion_tokens == 12
    assert response.instructions == "Be short."
    assert (response.temperature, response.store, response.tools) == (0, False, [])


def test_a_streamed_response(client: openai.OpenAI) -> None:
    """Every event in its order, and the last one holds the same as the whole answer."""
    whole: Any = client.responses.create(**EXACT, input=ASK)
    events = list(client.responses.create(**EXACT, input=ASK, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == last.response.output_text == whole.output_text
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert last.response.usage.input_tokens_details.cached_tokens > 0  # of the prompt, by now


def test_a_response_calls(client: openai.OpenAI, server: ThreadServer) -> None:
    """A forced call, whole and streamed; its items go back with the tool's output."""
    ask = {**EXACT, "max_output_tokens": 200, "temperature": 1, "tools": [FUNCTION], "input": ASK}
    ask["extra_body"] = {"seed": 3}
    response = client.responses.create(**ask, tool_choice="required", parallel_tool_calls=False)
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert response.status == "completed"
    with client.responses.stream(**ask, tool_choice={"type": "function", "name": "get_weather"}) as stream:
        streamed = list(stream)
    deltas = [event.delta for event in streamed if event.type == "response.function_call_arguments.delta"]
    done = [event for event in streamed if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done[0].arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [*ASK, *[item.model_dump() for item in response.output], output]
    followed = client.responses.create(**EXACT, input=items, tools=[FUNCTION])
    arguments = {"name": "get_weather", "arguments": call.arguments}
    turns = [*ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}]
    turns[-1]["tool_calls"][0]["function"] = arguments
    turns.append({"role": "tool", "tool_call_id": "c", "content": "sunny"})
    same = chat(client, messages=turns, tools=[WEATHER])
    assert followed.usage is not None
    assert followed.usage.input_tokens == same.usage.prompt_tokens
    assert followed.output_text == same.choices[0].message.content
    server.wait_for(server.is_idle)


class Weather(BaseModel):
    city: str
    days: int


def test_a_parsed_response(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="base", input="the fox", text_format=Weather, max_output_tokens=400, temperature=0.1,
        extra_body={"seed": 1, "repetition_penalty": 1.3},
    )  # fmt: skip
    if response.status == "completed":  # a random model may write a long city
        assert isinstance(response.output_parsed, Weather)
    else:
        assert response.output_text.lstrip().startswith("{")


def test_a_response_thinks(client: openai.OpenAI) -> None:
    """v1's template begins the reasoning: it is an item of its own, and its tokens are counted."""
    response = client.responses.create(**{**EXACT, "model": "v1"}, input="the fox")
    assert [item.type for item in response.output] == ["reasoning"]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    kinds = [event.type for event in client.responses.create(**{**EXACT, "model": "v1"}, input="the fox", stream=True)]
    assert "response.reasoning_text.delta" in kinds


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "no"}]}, "input"),
        ({"nonsense": 1}, "nonsense"),
        ({"max_output_tokens": 100000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strong"}}}}, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "strict": True, "schema": {"type": "object"}}}},
            "text.format",
        ),
        ({"tools": [{"type": "function", "name": "a", "strict": True, "parameters": {"type": "object"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ],
)
def test_what_a_response_refuses(server: ThreadServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/responses", {"model": "base", "input": "the fox", "max_output_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    error = ErrorResponse.model_validate(answer.json()).error
    assert (error.param or "").startswith(param if param != "max_output_tokens" else ("max_output_tokens", "input"))


# --- Messages


def test_a_message_is_the_chat(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    ask: Any = {"model": "base", "max_tokens": 12, "extra_body": GREEDY, "system": "Be short.", "messages": ASK}
    message = claude.messages.create(**ask)
    same = chat(client, messages=[{"role": "system", "content": "Be short."}, *ASK])
    assert [block.text for block in message.content if block.type == "text"] == [same.choices[0].message.content]
    assert message.stop_reason == "max_tokens"
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == same.usage.prompt_tokens
    assert usage.output_tokens == 12
    counted = claude.messages.count_tokens(model="base", system="Be short.", messages=ASK)
    assert counted.input_tokens == same.usage.prompt_tokens
    with claude.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == same.choices[0].message.content
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)


def test_a_message_begun_by_the_client(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    begun: Any = [*ASK, {"role": "assistant", "content": "It is"}]
    message = claude.messages.create(model="base", max_tokens=8, extra_body=GREEDY, messages=begun)
    same = chat(client, messages=begun, max_tokens=8, extra_body={"continue_final_message": True})
    assert [block.text for block in message.content if block.type == "text"] == [same.choices[0].message.content]


def test_a_message_stops(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    text = chat(client, max_tokens=20).choices[0].message.content
    stop = text[5:8]
    message = claude.messages.create(
        model="base", max_tokens=20, extra_body=GREEDY, messages=ASK, stop_sequences=[stop]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_a_message_uses_a_tool(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    ask: Any = {
        "model": "base", "max_tokens": 200, "messages": ASK, "tools": [TOOL], "extra_body": {"seed": 3},
    }  # fmt: skip
    message = claude.messages.create(**ask, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use"
    assert use.name == "get_weather"
    assert use.input["city"] in ("Paris", "Rome")
    with claude.messages.stream(**ask, tool_choice={"type": "tool", "name": "get_weather"}) as stream:
        final = stream.get_final_message()
    (streamed,) = [block for block in final.content if block.type == "tool_use"]
    assert streamed.input["city"] in ("Paris", "Rome")
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    counted = claude.messages.count_tokens(model="base", messages=turns, tools=[TOOL])
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(use.input)}}
    same = chat(
        client, tools=[WEATHER], max_tokens=1,
        messages=[
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
            {"role": "user", "content": "And?"},
        ],
    )  # fmt: skip
    assert counted.input_tokens == same.usage.prompt_tokens


def test_a_message_thinks(claude: anthropic.Anthropic) -> None:
    ask: Any = {"model": "v1", "max_tokens": 8, "extra_body": GREEDY, "messages": ASK}
    message = claude.messages.create(**ask)
    assert [block.type for block in message.content] == ["thinking"]
    with claude.messages.stream(**ask) as stream:
        assert [block.type for block in stream.get_final_message().content] == ["thinking"]
    message = claude.messages.create(**ask, thinking={"type": "disabled"})
    assert [block.type for block in message.content] == ["text"]


def test_an_image_is_refused_with_the_reason(server: ThreadServer) -> None:
    image = {"type": "input_image", "image_url": "https://example.org/a.png"}
    asked: dict[str, Any] = {"model": "base", "input": [{"role": "user", "content": [image]}]}
    answer = server.post("/v1/responses", asked)
    assert answer.status_code == 400
    assert "reads only text" in answer.json()["error"]["message"]
    source = {"type": "url", "url": "https://example.org/a.png"}
    asked = {
        "model": "base",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
    }
    answer = server.post("/v1/messages", asked)
    assert answer.status_code == 400
    assert "reads only text" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"nonsense": 1}, "nonsense"),
        ({"metadata": {"user_id": "u" * 600}}, "metadata.user_id"),
    ],
)
def test_what_a_message_refuses(server: ThreadServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/messages", {"model": "base", "max_tokens": 4, "messages": ASK, **fields})
    assert answer.status_code == 400, answer.text
    body = MessagesErrorResponse.model_validate(answer.json())
    assert (body.error.param or "").startswith(param)
    assert body.error.type == "invalid_request_error"


def test_errors_of_messages_are_anthropics(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="none", max_tokens=4, messages=ASK)
    assert caught.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model="base", max_tokens=20000, messages=ASK)
    assert "maximum context length" in refused.value.message


def test_answers_are_as_documented(server: ThreadServer) -> None:
    """The models of /openapi.json know every field that is sent, and none besides."""
    message = {"model": "base", "max_tokens": 4, "messages": ASK}
    for path, body, model in (
        ("/v1/responses", {"model": "base", "max_output_tokens": 4, "input": "the fox"}, ResponsesObject),
        ("/v1/messages", message, MessageObject),
        ("/v1/messages/count_tokens", {"model": "base", "messages": ASK}, TokenCount),
    ):
        answer = server.post(path, body).json()
        assert set(answer) == set(model.model_fields)
        model.model_validate(answer)


def test_a_stream_that_fails(server: ThreadServer) -> None:
    """The engine's client ends all streams: each API says so in its own events."""
    for path, body, last in (
        ("/v1/responses", {"model": "base", "input": "the fox", "ignore_eos": True}, "response.failed"),
        ("/v1/messages", {"model": "base", "max_tokens": 900, "messages": ASK}, "error"),
    ):
        body.pop("ignore_eos", None)
        with httpx.stream("POST", server.url + path, json={**body, "stream": True, "seed": 1}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.call(_fail(server))
            names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert names[-1] == last
    assert CALL  # the example that both files share
    server.wait_for(server.is_idle)


async def _fail(server: ThreadServer) -> None:
    from polymoe.server.errors import UnavailableError

    server.client.fail_all(UnavailableError("The server is shutting down.", code="draining"))
