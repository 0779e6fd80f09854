"""llama-index: completions, chats and streams through its OpenAI-like model, and a forced tool."""

from typing import Any, Literal

from common import CITIES, KEY, MODEL, URL
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather of a city"""
    return f"sunny in {city}"


def main() -> None:
    options: Any = {"model": MODEL, "api_base": URL + "/v1", "api_key": KEY, "max_retries": 0, "context_window": 1024}
    model = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True, temperature=0, max_tokens=16)
    messages = [ChatMessage(role="user", content="the fox")]
    whole = model.chat(messages).message.content
    streamed = list(model.stream_chat(messages))
    assert streamed[-1].message.content == whole
    plain = OpenAILike(**options, is_chat_model=False, temperature=0, max_tokens=16)
    assert plain.complete("the fox").text
    caller = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True, max_tokens=200)
    tool = FunctionTool.from_defaults(get_weather)
    answer = caller.chat_with_tools([tool], user_msg="the fox", tool_required=True)
    (call, *_) = caller.get_tool_calls_from_response(answer)
    assert call.tool_kwargs["city"] in CITIES


if __name__ == "__main__":
    main()
