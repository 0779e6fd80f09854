"""What clients may send to `/v1/messages`, Anthropic's API."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from polymoe.server.chat_messages import MAX_MESSAGES, MAX_PARTS, ChatMessage, ToolName
from polymoe.server.errors import printable
from polymoe.server.known_fields import (
    OF_ANTHROPIC,
    OF_ANTHROPIC_BLOCKS,
    OF_ANTHROPIC_TOOLS,
    OF_OUTPUT_CONFIG,
    OF_THINKING,
)
from polymoe.server.protocol import MAX_TOOLS
from polymoe.server.strict import Strict
from polymoe.server.turn_request import MAX_COUNT, StopStrings, TurnRequest

Id = Annotated[str, Field(max_length=256)]


class CacheControl(Strict):
    """Changes nothing: every prompt's beginning is remembered."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Marked(Strict):
    unsupported = OF_ANTHROPIC_BLOCKS

    cache_control: CacheControl | None = None


class TextBlock(Marked):
    type: Literal["text"]
    text: str


class ThinkingBlock(Marked):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # nothing here is signed


class ToolUseBlock(Marked):
    type: Literal["tool_use"]
    id: Id
    name: ToolName
    input: dict[str, Any]


class TextResult(TextBlock):
    @model_validator(mode="before")
    @classmethod
    def refuse_other_kinds(cls, data: Any) -> Any:
        return _refuse_kinds(data, ("text",))


class ToolResultBlock(Marked):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: str | Annotated[list[TextResult], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    is_error: bool | None = None  # the text says what went wrong; templates have no place for more


class OtherBlock(Strict):
    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        return _refuse_kinds(data, ())


_BLOCKS = {
    "text": "TextBlock", "thinking": "ThinkingBlock", "tool_use": "ToolUseBlock", "tool_result": "ToolResultBlock"
}  # fmt: skip


def _kind(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return _BLOCKS.get(kind, "OtherBlock") if isinstance(kind, str) else "TextBlock"


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")]
    | Annotated[OtherBlock, Tag("OtherBlock")],
    Discriminator(_kind),
]
_PLACES = {"user": (TextBlock, ToolResultBlock), "assistant": (TextBlock, ThinkingBlock, ToolUseBlock)}


class MessageParam(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], Field(max_length=MAX_PARTS, fail_fast=True)]

    @model_validator(mode="after")
    def check_blocks(self) -> "MessageParam":
        blocks = [] if isinstance(self.content, str) else self.content
        if wrong := next((b for b in blocks if not isinstance(b, _PLACES.get(self.role, (TextBlock,)))), None):
            raise PydanticCustomError(
                "invalid_value",
                "A message of role {role} has no blocks of type {kind}.",
                {"name": "content", "role": self.role, "kind": getattr(wrong, "type", "?")},
            )
        return self

    def chat_messages(self) -> list[ChatMessage]:
        """Results of tools are messages of their own in a chat."""
        if isinstance(self.content, str):
            return [_message(self.role, self.content)]
        if self.role == "assistant":
            return [self._answer(self.content)]
        messages: list[ChatMessage] = []
        texts: list[str] = []

        def end_text() -> None:
            if texts:
                messages.append(_message(self.role, _content(texts)))
                texts.clear()

        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(block.text)
            elif isinstance(block, ToolResultBlock):
                end_text()
                result = block.content or ""
                content = result if isinstance(result, str) else _content([part.text for part in result])
                messages.append(
                    ChatMessage.model_validate({"role": "tool", "content": content, "tool_call_id": block.tool_use_id})
                )
        end_text()
        return messages or [_message(self.role, "")]

    @staticmethod
    def _answer(blocks: list[Any]) -> ChatMessage:
        texts = [block.text for block in blocks if isinstance(block, TextBlock)]
        thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
        calls = [
            {
                "id": block.id,
                "type": "function",
                "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
            }
            for block in blocks
            if isinstance(block, ToolUseBlock)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
        if thoughts:
            message["reasoning"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return ChatMessage.model_validate(message)


class ToolParam(Strict):
    unsupported = OF_ANTHROPIC_TOOLS

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None  # the schema holds either way where calls are forced
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None  # arguments are streamed as they are written

    @model_validator(mode="before")
    @classmethod
    def refuse_other_kinds(cls, data: Any) -> Any:
        return _refuse_kinds(data, ("custom",))


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def check_name(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError(
                "invalid_value", "tool_choice needs name where its type is tool, and only there.", {"name": "name"}
            )
        return self


class Thinking(Strict):
    unsupported = OF_THINKING

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    unsupported = OF_OUTPUT_CONFIG

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(TurnRequest):
    """What makes the prompt."""

    unsupported = OF_ANTHROPIC
    names: ClassVar[Mapping[str, str]] = {
        "response_format": "output_config.format",
        "structured_outputs": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "max_completion_tokens": "max_tokens",
        "stop": "stop_sequences",
        "user": "metadata.user_id",
    }

    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    def chat_fields(self) -> dict[str, Any]:
        output = self.output_config or OutputConfig()
        fields: dict[str, Any] = {
            "messages": self._messages(),
            "tools": [_tool(tool) for tool in self.tools] if self.tools else None,
            "chat_template_kwargs": self._template_variables(),
            "reasoning_effort": "xhigh" if output.effort == "max" else output.effort,
            "user": (self.metadata or {}).get("user_id"),
            **self._choice(),
        }
        # Anthropic's way to begin the answer for the model.
        if self.messages[-1].role == "assistant":
            fields["continue_final_message"] = True
        if output.format is not None:
            schema = {"name": "answer", "schema": output.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    def _messages(self) -> list[ChatMessage]:
        system = self.system if isinstance(self.system, str) else "\n".join(b.text for b in self.system or ())
        messages = [_message("system", system)] if system else []
        for message in self.messages:
            messages += message.chat_messages()
        return messages

    def _choice(self) -> dict[str, Any]:
        chosen = self.tool_choice
        if chosen is None:
            return {}
        named = {"type": "function", "function": {"name": chosen.name}}
        names: dict[str, Any] = {"auto": "auto" if self.tools else None, "any": "required", "none": "none"}
        return {
            "tool_choice": names.get(chosen.type, named) if chosen.type != "tool" else named,
            "parallel_tool_calls": False if chosen.disable_parallel_tool_use else None,
        }

    def _template_variables(self) -> dict[str, Any] | None:
        """Templates that know of thinking call it so."""
        if self.thinking is None:
            return self.chat_template_kwargs
        return {"enable_thinking": self.thinking.type != "disabled", **(self.chat_template_kwargs or {})}


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, le=MAX_COUNT)
    stop_sequences: StopStrings | None = None

    def chat_fields(self) -> dict[str, Any]:
        return super().chat_fields() | {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences or None}


def _message(role: str, content: Any) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content})


def _tool(tool: ToolParam) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _content(texts: list[str]) -> Any:
    """As a chat has it: one text stays text for templates that read nothing else."""
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _refuse_kinds(data: Any, kinds: tuple[str, ...]) -> Any:
    """What is wrong with an image or a tool of Anthropic's is its kind, not the fields that come with it."""
    kind = data.get("type") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise PydanticCustomError(
            "invalid_value",
            "type {kind} is not supported by this server, which reads only text and runs no tools itself.",
            {"name": "type", "kind": printable(repr(kind[:200]))},
        )
    return data
