"""What clients may send. Unknown fields are refused, and so are those of `known_fields` when they ask for something."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from polymoe.errors import RequestError
from polymoe.protocol.request import (
    DEFAULT_SLO_CLASS,
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PRIORITY,
    MAX_STOP_CHARS,
    MAX_STOPS,
    QoS,
    SamplingParams,
    sampling_params,
)
from polymoe.protocol.structured_outputs import StructuredOutputsParams
from polymoe.server.chat_messages import Messages, NamedTool, Tool
from polymoe.server.known_fields import OF_COMPLETIONS, OF_GENERATION, OF_STREAM_OPTIONS
from polymoe.server.strict import Strict
from polymoe.server.structure_fields import ResponseFormat, StructuredOutputs

MAX_PROMPTS = 256
_MAX_METADATA = 16  # OpenAI's limit
MAX_TOOLS = 128
MAX_ALLOWED = 65536  # token ids
_MAX_COUNT = 2**31 - 1

# fail_fast: a list of a million wrong items is one error, not a million of them in memory.
TokenId = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


class Ignored(Strict):
    """Fields that change nothing in what a self-hosted server computes: accepted, and ignored on purpose."""

    metadata: dict[str, str] | None = Field(None, max_length=_MAX_METADATA)
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
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=_MAX_COUNT)  # -1: to what there is room for
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, max_length=256)
    user: str | None = Field(None, max_length=512)
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    slo_class: str | None = Field(None, min_length=1, max_length=64)

    @model_validator(mode="after")
    def check_stream_options(self) -> "GenerationRequest":
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs cannot be streamed.", param="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1.", param="truncate_prompt_tokens")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true.", param="stream_options")
        return self

    @model_validator(mode="after")
    def check_best_of(self) -> "GenerationRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not supported by this server.", param="best_of")
        return self

    @model_validator(mode="after")
    def check_structure(self) -> "GenerationRequest":
        if self.structured_outputs is not None and self.response_format not in (None, ResponseFormat(type="text")):
            raise RequestError("Give response_format or structured_outputs, not both.", param="structured_outputs")
        return self

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """What the answer has to look like, whichever field says it. Raises `RequestError`."""
        if self.structured_outputs is not None:
            return self.structured_outputs.params()
        return None if self.response_format is None else self.response_format.params()

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
        given["structured_outputs"] = self.structure
        given["logit_bias"] = _token_keys(self.logit_bias or {})
        given.update(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        return sampling_params(defaults, given)


class CompletionRequest(GenerationRequest):
    unsupported = OF_COMPLETIONS

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


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # null: auto where there are tools
    parallel_tool_calls: bool | None = None  # false: one call at most
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None  # for the template
    include_reasoning: bool | None = None  # false: it is left out of the answer
    add_generation_prompt: bool | None = None  # null is true
    continue_final_message: bool | None = None
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

    @model_validator(mode="after")
    def check_tools(self) -> "ChatCompletionRequest":
        names = [tool.function.name for tool in self.tools or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RequestError(f"There are two tools named {twice}.", param="tools")
        if self.tool_choice in (None, "none"):
            return self
        if not names:
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise RequestError(f"There is no tool named {self.tool_choice.function.name}.", param="tool_choice")
        if self.tool_choice != "auto" and self.structure is not None:
            raise RequestError(
                "tool_choice required, or a named tool, and a structured output contradict each other.",
                param="tool_choice",
            )
        return self

    @model_validator(mode="after")
    def check_ending(self) -> "ChatCompletionRequest":
        check_ending(self.continue_final_message, self.add_generation_prompt)
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the answer may call: none with `tool_choice: none`."""
        return [] if self.tool_choice == "none" else self.tools or []

    def template_variables(self) -> dict[str, Any]:
        """What the variant's template reads besides the messages. Raises `RequestError`."""
        variables = template_variables(
            self.chat_template_kwargs, self.continue_final_message, self.add_generation_prompt
        )
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                variables.setdefault("enable_thinking", False)
        if self.callable_tools:
            variables["tools"] = [tool.for_template() for tool in self.callable_tools]
        return variables


def check_ending(continue_final_message: bool | None, add_generation_prompt: bool | None) -> None:
    """Raises `RequestError` for both at once."""
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message goes on with the last message; send add_generation_prompt: false with it.",
            param="continue_final_message",
        )


def template_variables(
    kwargs: Mapping[str, Any] | None, continue_final_message: bool | None, add_generation_prompt: bool | None
) -> dict[str, Any]:
    """`chat_template_kwargs` and how the text ends. Raises `RequestError` for variables that are not the client's."""
    variables = dict(kwargs or {})
    if taken := sorted({"tools", "continue_final_message"} & set(variables)):
        raise RequestError(
            f"chat_template_kwargs cannot set {taken[0]}; it is a field of its own.", param="chat_template_kwargs"
        )
    if continue_final_message:
        variables |= {"continue_final_message": True, "add_generation_prompt": False}
    elif add_generation_prompt is not None:
        variables["add_generation_prompt"] = add_generation_prompt
    return variables


def _token_keys(biases: Mapping[str, float]) -> dict[int, float]:
    """JSON knows only text keys. Raises `RequestError`."""
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError("logit_bias must map token ids to biases.", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}
