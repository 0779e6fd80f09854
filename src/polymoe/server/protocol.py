"""What clients may send. Unknown fields are refused, and so are those of `known_fields` when they ask for something."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from polymoe.errors import RequestError
from polymoe.protocol.request import (
    DEFAULT_SLO_CLASS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PRIORITY,
    MAX_STOP_CHARS,
    MAX_STOPS,
    QoS,
    SamplingParams,
    sampling_params,
)
from polymoe.server.errors import printable
from polymoe.server.known_fields import (
    OF_GENERATION,
    OF_MESSAGES,
    OF_STREAM_OPTIONS,
    OF_TOKENIZING,
    Inert,
    asks_for_nothing,
)

MAX_PROMPTS = 256
MAX_MESSAGES = 4096
MAX_PARTS = 256
_MAX_METADATA = 16  # OpenAI's limit
_MAX_COUNT = 2**31 - 1

# fail_fast: a list of a million wrong items is one error, not a million of them in memory.
TokenId = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


def _document_unsupported(schema: dict[str, Any], model: "type[Strict]") -> None:
    """The values of unsupported fields that are accepted, for the JSON schema."""
    for name, values in model.unsupported.items():
        if name not in model.model_fields:
            schema["properties"][name] = {
                "enum": list(values),
                "description": "Not supported: only what asks for nothing.",
            }


class Strict(BaseModel):
    """No unknown fields, no conversions ("1" is no number), no NaN."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=_document_unsupported,
    )
    unsupported: ClassVar[Inert] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.unsupported:
                raise PydanticCustomError(
                    "unknown_parameter",
                    "Unrecognized request argument supplied: {name}",
                    {"name": printable(name[:200])},
                )
            elif not asks_for_nothing(value, cls.unsupported[name]):
                allowed = " or ".join(json.dumps(value) for value in cls.unsupported[name])
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "{name} is not supported by this server; leave it out, or send {allowed}.",
                    {"name": name, "allowed": allowed},
                )
        return kept


class Ignored(Strict):
    """Fields that change nothing in what a self-hosted server computes: accepted, and ignored on purpose."""

    metadata: dict[str, str] | None = Field(None, max_length=_MAX_METADATA)
    parallel_tool_calls: bool | None = None  # no tools are called, so none in parallel
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, str] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    session_id: str | None = None
    store: bool | None = None


class StreamOptions(Strict):
    unsupported = OF_STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Ignored):
    """What completions and chat completions have in common."""

    unsupported = OF_GENERATION

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_COUNT)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(None, ge=0, le=_MAX_COUNT)
    min_tokens: int | None = Field(None, ge=0, le=_MAX_COUNT)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, max_length=256)
    user: str | None = Field(None, max_length=512)
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    slo_class: str | None = Field(None, min_length=1, max_length=64)

    @model_validator(mode="after")
    def check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true.", param="stream_options")
        return self

    @model_validator(mode="after")
    def check_best_of(self) -> "GenerationRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not supported by this server.", param="best_of")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def qos(self) -> QoS:
        """`user` is the tenant: OpenAI's name for the end user on whose behalf a client asks."""
        return QoS(tenant=self.user or "", priority=self.priority or 0, slo_class=self.slo_class or DEFAULT_SLO_CLASS)

    def sampling(
        self, defaults: Mapping[str, Any], max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The request's parameters; what it leaves out comes from the variant's generation config (`defaults`),
        then from `SamplingParams`. Raises `RequestError`."""
        fields = ((name, getattr(self, name, None)) for name in SamplingParams.__struct_fields__)
        given: dict[str, Any] = {name: value for name, value in fields if value is not None}
        if isinstance(self.stop, str):
            given["stop"] = [self.stop]
        given["logit_bias"] = _token_keys(self.logit_bias or {})
        given.update(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        return sampling_params(defaults, given)


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None  # null is true

    def prompts(self) -> list[str] | list[list[int]]:
        """The batch; a single prompt is a batch of one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return cast(list[str] | list[list[int]], [self.prompt] if isinstance(self.prompt[0], int) else self.prompt)


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

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    name: str | None = None

    @model_validator(mode="after")
    def check_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise RequestError(f"content of a {self.role} message must not be null.", param="messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """`content` as it came: the variant's template decides in which form it reads it."""
        content = [part.model_dump() for part in self.content] if isinstance(self.content, list) else self.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    chat_template_kwargs: dict[str, Any] | None = None  # what the variant's template may read besides the messages
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_COUNT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def check_pairs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:  # 0 asks for nothing
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("Give max_completion_tokens or max_tokens, not both.", param="max_tokens")
        return self


class TokenizeRequest(Strict):
    """Either `prompt` or `messages`."""

    unsupported = OF_TOKENIZING

    model: str
    prompt: str | None = None
    messages: Messages | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # null is true for a prompt; a chat template writes its own
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("Give either prompt or messages.", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise RequestError(
                "add_special_tokens is for prompts: a chat template writes its special tokens itself.",
                param="add_special_tokens",
            )
        return self


class DetokenizeRequest(Strict):
    model: str
    tokens: TokenIds


def _token_keys(biases: Mapping[str, float]) -> dict[int, float]:
    """JSON knows only text keys. Raises `RequestError`."""
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError("logit_bias must map token ids to biases.", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}
