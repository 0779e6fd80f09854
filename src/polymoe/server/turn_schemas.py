"""The shapes of the Responses and Messages API's answers, as /openapi.json documents them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polymoe.server.schemas import ErrorFields

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputItem(BaseModel):
    """Reasoning, a message or a call; the last three are a call's."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Status
    role: Literal["assistant"] | None = None
    summary: list[Any] | None = None
    content: list[OutputText] | None = None
    encrypted_content: None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesError(BaseModel):
    code: str
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponsesObject(BaseModel):
    """The answer, with the request's fields repeated."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponsesError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class ResponsesEvent(BaseModel):
    """`type` says what else it has: `response.created`, `response.output_text.delta` …"""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class ContentBlock(BaseModel):
    """Text, thinking, or the use of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessagesUsage(BaseModel):
    """`input_tokens` without those found in the cache."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageObject(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessagesEvent(BaseModel):
    """`type` says what else it has: `message_start`, `content_block_delta` …"""

    model_config = ConfigDict(extra="allow")

    type: str


class MessagesErrorResponse(BaseModel):
    type: Literal["error"]
    error: ErrorFields


class TokenCount(BaseModel):
    input_tokens: int


# What the events of these APIs hold; each has the name of its type, and none follows the last.
NAMED_EVENTS: tuple[type[BaseModel], ...] = (ResponsesEvent, MessagesEvent)
