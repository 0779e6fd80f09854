"""Anthropic's SDK: messages whole and streamed, tools, counted tokens, errors."""

from typing import Any

import anthropic
from common import ASK, CITIES, DESCRIPTION, KEY, MODEL, PARAMETERS, SPENT_KEY, URL


def connect(url: str = URL, key: str = KEY) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


def main() -> None:
    client = connect()
    ask: Any = {"model": MODEL, "max_tokens": 16, "messages": ASK, "extra_body": {"temperature": 0}}
    message = client.messages.create(**ask)
    (block,) = message.content
    assert block.type == "text"
    assert message.stop_reason == "max_tokens"
    with client.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == block.text
    assert client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens > 0

    tool: Any = {"name": "get_weather", "description": DESCRIPTION, "input_schema": PARAMETERS}
    forced = client.messages.create(
        model=MODEL, max_tokens=200, messages=ASK, tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )  # fmt: skip
    (use,) = [block for block in forced.content if block.type == "tool_use"]
    assert use.input["city"] in CITIES
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
    turns: Any = [*ASK, {"role": "assistant", "content": forced.content}, result]
    client.messages.create(model=MODEL, max_tokens=4, messages=turns, tools=[tool])

    for kind, act in (
        (anthropic.NotFoundError, lambda: client.messages.create(model="none", max_tokens=4, messages=ASK)),
        (anthropic.AuthenticationError, lambda: connect(key="wrong").messages.create(**ask)),
        (anthropic.RateLimitError, lambda: connect(key=SPENT_KEY).messages.create(**ask)),
        (anthropic.BadRequestError, lambda: client.messages.create(model=MODEL, max_tokens=9999, messages=ASK)),
    ):
        found = None
        try:
            act()
        except anthropic.APIStatusError as error:
            found = error
        assert type(found) is kind, found
        assert found.request_id, "no request-id"


if __name__ == "__main__":
    main()
