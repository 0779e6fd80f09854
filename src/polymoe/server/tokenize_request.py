"""What clients may send to /tokenize and /detokenize."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from polymoe.errors import RequestError
from polymoe.server.chat_messages import Messages, Tool
from polymoe.server.known_fields import OF_TOKENIZING
from polymoe.server.protocol import MAX_TOOLS, TokenIds, check_ending, template_variables
from polymoe.server.strict import Strict


class TokenizeRequest(Strict):
    """Either `prompt` or `messages`."""

    unsupported = OF_TOKENIZING

    model: str
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
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
        check_ending(self.continue_final_message, self.add_generation_prompt)
        return self

    def template_variables(self) -> dict[str, Any]:
        """As those of a chat. Raises `RequestError`."""
        variables = template_variables(
            self.chat_template_kwargs, self.continue_final_message, self.add_generation_prompt
        )
        if self.tools:
            variables["tools"] = [tool.for_template() for tool in self.tools]
        return variables


class DetokenizeRequest(Strict):
    model: str
    tokens: TokenIds
