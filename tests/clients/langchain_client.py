"""langchain-openai: chats, streams, bound tools, structured output by schema and by function call."""

from typing import Any, Literal

from common import CITIES, KEY, MODEL, URL
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr


class Weather(BaseModel):
    """Weather of a city"""

    city: Literal["Paris", "Rome"]
    sunny: bool


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather of a city"""
    return f"sunny in {city}"


def main() -> None:
    options: Any = {"model": MODEL, "base_url": URL + "/v1", "api_key": SecretStr(KEY), "max_retries": 0}
    model = ChatOpenAI(**options, temperature=0, max_completion_tokens=16)
    whole = model.invoke("the fox")
    assert "".join(str(chunk.content) for chunk in model.stream("the fox")) == whole.content
    model = ChatOpenAI(**options, max_completion_tokens=600, seed=1)  # a random model may write many spaces
    called: Any = model.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False).invoke("the fox")
    assert called.tool_calls[0]["args"]["city"] in CITIES
    for method in ("json_schema", "function_calling"):
        answer = model.with_structured_output(Weather, method=method).invoke("the fox")  # type: ignore[arg-type]
        assert isinstance(answer, Weather), method
    through_responses = ChatOpenAI(**options, temperature=0, use_responses_api=True)
    assert through_responses.invoke("the fox", max_output_tokens=16).text == whole.content


if __name__ == "__main__":
    main()
