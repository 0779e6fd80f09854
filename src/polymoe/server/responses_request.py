"""What clients may send to `/v1/responses`. Nothing is kept: a request carries the whole conversation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from polymoe.errors import RequestError
from polymoe.server.chat_messages import MAX_CALLS, MAX_MESSAGES, MAX_PARTS, ToolName
from polymoe.server.errors import printable
from polymoe.server.known_fields import OF_REASONING, OF_RESPONSES, OF_RESPONSES_ITEMS, OF_STREAM_OPTIONS, OF_TEXT
from polymoe.server.protocol import MAX_TOOLS
from polymoe.server.strict import Strict
from polymoe.server.turn_request import MAX_COUNT, TurnRequest, Turns

Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    unsupported = OF_RESPONSES_ITEMS

    type: Literal["input_text", "output_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def refuse_other_kinds(cls, data: Any) -> Any:
        return _refuse_kinds(data, ("input_text", "output_text"), "input_text")


Parts = Annotated[list[InputText], Field(max_length=MAX_PARTS, fail_fast=True)]


class InputMessage(Strict):
    """`type` may be left out."""

    unsupported = OF_RESPONSES_ITEMS

    type: Literal["message"] | None = None
    id: Id | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    status: Status | None = None


class FunctionCall(Strict):
    unsupported = OF_RESPONSES_ITEMS

    type: Literal["function_call"]
    id: Id | None = None
    call_id: Id
    name: ToolName
    arguments: str
    status: Status | None = None


class FunctionCallOutput(Strict):
    unsupported = OF_RESPONSES_ITEMS

    type: Literal["function_call_output"]
    id: Id | None = None
    call_id: Id
    output: str | Parts
    status: Status | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


ReasoningTexts = Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)]


class ReasoningItem(Strict):
    unsupported = OF_RESPONSES_ITEMS

    type: Literal["reasoning"]
    id: Id | None = None
    summary: ReasoningTexts | None = None  # what is not in `content`
    content: ReasoningTexts | None = None
    status: Status | None = None


class OtherItem(Strict):
    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        return _refuse_kinds(data, (), "message, function_call, function_call_output or reasoning")


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    known = {
        None: "InputMessage", "message": "InputMessage", "function_call": "FunctionCall",
        "function_call_output": "FunctionCallOutput", "reasoning": "ReasoningItem",
    }  # fmt: skip
    return known.get(kind, "OtherItem") if isinstance(kind, str | None) else "OtherItem"


Item = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[FunctionCall, Tag("FunctionCall")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[OtherItem, Tag("OtherItem")],
    Discriminator(_kind),
]


class FunctionTool(Strict):
    unsupported = OF_RESPONSES_ITEMS

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Strict):
    type: Literal["function"]
    name: ToolName


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def check(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise RequestError(
                "text.format needs name and schema where its type is json_schema, and only there.", param="text.format"
            )
        return self


class TextConfig(Strict):
    unsupported = OF_TEXT

    format: TextFormat | None = None


class Reasoning(Strict):
    unsupported = OF_REASONING

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesStreamOptions(Strict):
    unsupported = OF_STREAM_OPTIONS


class ResponsesRequest(TurnRequest):
    unsupported = OF_RESPONSES
    names: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "structured_outputs": "text.format",
        "reasoning_effort": "reasoning.effort",
    }

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponsesStreamOptions | None = None
    user: str | None = Field(None, max_length=512)

    def chat_fields(self) -> dict[str, Any]:
        chosen = self.tool_choice
        if isinstance(chosen, ChosenFunction):
            chosen_field: Any = {"type": "function", "function": {"name": chosen.name}}
        else:
            chosen_field = chosen
        return {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "tools": [_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": chosen_field,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "user": self.user,
        }

    def _response_format(self) -> dict[str, Any] | None:
        given = None if self.text is None else self.text.format
        if given is None or given.type != "json_schema":
            return None if given is None else {"type": given.type}
        return {
            "type": "json_schema",
            "json_schema": {"name": given.name, "schema": given.schema_, "strict": given.strict},
        }

    def _messages(self) -> list[Any]:
        turns = Turns()
        if self.instructions is not None:
            turns.add(role="system", content=self.instructions)
        if isinstance(self.input, str):
            turns.add(role="user", content=self.input)
            return turns.messages
        calls = 0
        for item in self.input:
            match item:
                case InputMessage(role="assistant"):
                    turns.add_text(_text(item.content))
                case InputMessage():
                    turns.add(role=item.role, content=_content(item.content))
                case FunctionCall():
                    turns.add_call(item.call_id, item.name, item.arguments)
                    calls += 1
                case FunctionCallOutput():
                    turns.add(role="tool", content=_content(item.output), tool_call_id=item.call_id)
                case ReasoningItem():
                    turns.add_thought("".join(part.text for part in item.content or item.summary or ()))
        if calls > MAX_CALLS:
            raise RequestError(f"There are {calls} calls in the input; at most {MAX_CALLS} are read.", param="input")
        turns.end_answer()
        return turns.messages


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _content(content: str | list[InputText]) -> Any:
    """As a chat has it: one text stays text for templates that read nothing else."""
    if isinstance(content, str) or len(content) == 1:
        return _text(content)
    return [{"type": "text", "text": part.text} for part in content]


def _refuse_kinds(data: Any, kinds: tuple[str, ...], known: str) -> Any:
    """What is wrong with an image or a built-in tool is its kind, not the fields that come with it."""
    kind = data.get("type") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise PydanticCustomError(
            "invalid_value",
            "type {kind} is not supported by this server, which keeps nothing and reads only text; send {known}.",
            {"name": "type", "kind": printable(repr(kind[:200])), "known": known},
        )
    return data
