"""The messages and tools of a chat."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from polymoe.errors import RequestError
from polymoe.server.errors import printable
from polymoe.server.known_fields import OF_MESSAGES
from polymoe.server.strict import Strict
from polymoe.server.strict_schema import check_strict

MAX_MESSAGES = 4096
MAX_PARTS = 256
MAX_CALLS = 256

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class Function(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; null: no arguments are described
    strict: bool | None = None  # the schema holds either way where calls are forced; true: OpenAI's rules for it

    @model_validator(mode="after")
    def check_rules(self) -> "Function":
        if self.strict and self.parameters is not None:
            check_strict(self.parameters, f"function '{self.name}'", "tools")
        return self


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(Strict):
    name: ToolName


class NamedTool(Strict):
    """The one that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    name: ToolName
    arguments: str  # JSON


class ToolCall(Strict):
    id: str = Field(max_length=256)
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # what is put together from a stream has one

    def for_template(self) -> dict[str, Any]:
        """With the arguments as an object, which is what templates write down. Raises `RequestError`."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(
                f"The arguments of the call {printable(self.id[:64])!r} must be a JSON object in a string.",
                param="messages",
            )
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class TextPart(Strict):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def refuse_other_kinds(cls, data: Any) -> Any:
        """Images, sound and files: what is wrong is their kind, not the fields that come with it."""
        kind = data.get("type", "text") if isinstance(data, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "invalid_value",
                "This server reads only text: a part of type {kind} is not supported; send parts of type text.",
                {"name": "type", "kind": printable(repr(kind[:200]))},
            )
        return data


class ChatMessage(Strict):
    unsupported = OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = Field(
        None, validate_default=True
    )
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning: str | None = None
    reasoning_content: str | None = None  # its older name

    @field_validator("content")
    @classmethod
    def check_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("missing", "only an assistant's message may be without content")
        return content

    @model_validator(mode="after")
    def check_calls(self) -> "ChatMessage":
        if self.role != "assistant" and (self.tool_calls or self.thoughts):
            raise RequestError(
                f"Only assistant messages have tool_calls and reasoning, not {self.role} ones.", param="messages"
            )
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise RequestError("tool_call_id belongs to tool messages, and each has one.", param="messages")
        return self

    @property
    def thoughts(self) -> str | None:
        return self.reasoning_content if self.reasoning is None else self.reasoning

    def for_template(self) -> dict[str, Any]:
        """`content` as it came: the variant's template decides in which form it reads it. Raises `RequestError`."""
        content = [part.model_dump() for part in self.content] if isinstance(self.content, list) else self.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.thoughts is not None:
            # Templates of Qwen and DeepSeek, and of gpt-oss.
            message |= {"reasoning_content": self.thoughts, "thinking": self.thoughts}
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
