"""litellm: chats, streams and tools through its own model of OpenAI's API, and the error classes that it makes."""

import json
from typing import Any

import litellm
from common import ASK, CITIES, DESCRIPTION, KEY, MODEL, PARAMETERS, SPENT_KEY, URL

COMMON: Any = {"model": f"openai/{MODEL}", "api_base": URL + "/v1", "api_key": KEY, "messages": ASK, "max_retries": 0}


def main() -> None:
    whole: Any = litellm.completion(**COMMON, temperature=0, max_tokens=16)
    stream: Any = litellm.completion(**COMMON, temperature=0, max_tokens=16, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "description": DESCRIPTION, "parameters": PARAMETERS},
    }
    forced: Any = litellm.completion(**COMMON, tools=[tool], tool_choice="required", max_tokens=200)
    assert json.loads(forced.choices[0].message.tool_calls[0].function.arguments)["city"] in CITIES
    for kind, options in (
        (litellm.BadRequestError, {"temperature": -1}),
        (litellm.NotFoundError, {"model": "openai/none"}),
        (litellm.AuthenticationError, {"api_key": "wrong"}),
        (litellm.RateLimitError, {"api_key": SPENT_KEY}),
    ):
        try:
            litellm.completion(**{**COMMON, "max_tokens": 4, **options})
        except kind:
            pass
        else:
            raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    main()
