"""openai-python: every status its class, streams, tools, parsed answers, the Responses API, lists of models."""

import json
from collections.abc import Callable
from typing import Any, Literal

import openai
from common import ASK, CITIES, DESCRIPTION, KEY, LOADING_URL, MODEL, PARAMETERS, SPENT_KEY, URL
from pydantic import BaseModel

FUNCTION: Any = {"name": "get_weather", "description": DESCRIPTION, "parameters": PARAMETERS}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


def connect(url: str = URL, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)


def raises(kind: type[Exception], act: Callable[[], object], status: int, code: str | None = None) -> None:
    found = None
    try:
        act()
    except openai.APIStatusError as error:
        found = error
    assert type(found) is kind, found
    assert found.status_code == status, found
    assert code is None or found.code == code, found
    assert found.request_id, "no x-request-id"


def errors(client: openai.OpenAI) -> None:
    def ask(client: openai.OpenAI = client, model: str = MODEL, **options: Any) -> Callable[[], object]:
        return lambda: client.chat.completions.create(model=model, messages=ASK, max_tokens=4, **options)

    raises(openai.BadRequestError, ask(temperature=-1), 400, "invalid_value")
    raises(openai.BadRequestError, ask(extra_body={"nonsense": 1}), 400, "unknown_parameter")
    raises(openai.AuthenticationError, ask(connect(key="wrong")), 401, "invalid_api_key")
    raises(openai.NotFoundError, ask(model="none"), 404, "model_not_found")
    raises(openai.NotFoundError, lambda: client.get("/nowhere", cast_to=object), 404, "not_found")
    raises(openai.APIStatusError, ask(user="u" * (5 << 20)), 413)
    raises(openai.RateLimitError, ask(connect(key=SPENT_KEY)), 429, "rate_limit_exceeded")
    raises(openai.InternalServerError, ask(connect(LOADING_URL)), 503, "loading")


def chats(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**ask)
    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 16
    completion = client.completions.create(
        model=MODEL, prompt=["the fox", "a dog"], max_tokens=4, logprobs=1, echo=True
    )
    assert len(completion.choices) == 2
    parsed = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Weather, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Weather)


def tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": FUNCTION}
    ask: Any = {"model": MODEL, "messages": ASK, "tools": [tool], "max_tokens": 200, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**ask, tool_choice="required").choices[0]
    assert answer.finish_reason == "tool_calls"
    call: Any = (answer.message.tool_calls or [])[0]
    assert json.loads(call.function.arguments)["city"] in CITIES
    with client.chat.completions.stream(**ask, tool_choice="required") as stream:
        final = stream.get_final_completion().choices[0].message
    streamed: Any = (final.tool_calls or [])[0]
    assert json.loads(streamed.function.arguments)["city"] in CITIES
    turns: Any = [*ASK, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    again = client.chat.completions.create(model=MODEL, messages=turns, tools=[tool], max_tokens=4)
    assert again.usage is not None


def responses(client: openai.OpenAI) -> None:
    whole: Any = client.responses.create(model=MODEL, input="the fox", temperature=0, max_output_tokens=16)
    with client.responses.stream(model=MODEL, input="the fox", temperature=0, max_output_tokens=16) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    parsed = client.responses.parse(model=MODEL, input="the fox", text_format=Weather, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Weather)
    tool: Any = {"type": "function", "strict": True, **FUNCTION}
    forced: Any = client.responses.create(
        model=MODEL, input=ASK, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = [item for item in forced.output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [*ASK, *forced.output, output]
    assert client.responses.create(model=MODEL, input=items, tools=[tool], max_output_tokens=4).status == "incomplete"


def main() -> None:
    client = connect()
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve("alias").id == "alias"
    errors(client)
    chats(client)
    tools(client)
    responses(client)
    answer = client.chat.completions.with_raw_response.create(
        model="alias", messages=ASK, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1"


if __name__ == "__main__":
    main()
