"""instructor: pydantic models out of a tool call, of a JSON schema, and of a partial stream."""

from typing import Any, Literal

import instructor
import openai
from common import ASK, KEY, MODEL, URL
from pydantic import BaseModel

# A random model may write many spaces.
GENEROUS: Any = {"max_tokens": 600, "seed": 1, "temperature": 2, "parallel_tool_calls": False}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


def main() -> None:
    client = openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        structured: Any = instructor.from_openai(client, mode=mode)
        answer = structured.chat.completions.create(
            model=MODEL, messages=ASK, response_model=Weather, max_retries=0, **GENEROUS
        )
        assert isinstance(answer, Weather), mode
    partial: Any = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(partial.chat.completions.create_partial(model=MODEL, messages=ASK, response_model=Weather, **GENEROUS))
    assert parts[-1].city in ("Paris", "Rome")


if __name__ == "__main__":
    main()
