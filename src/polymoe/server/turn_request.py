"""What the requests of the Responses and the Messages API have in common: each is one chat, and becomes the same
`ChatCompletionRequest` that `/v1/chat/completions` reads."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from polymoe.errors import RequestError
from polymoe.protocol.request import MAX_PRIORITY, MAX_STOP_CHARS, MAX_STOPS
from polymoe.server.chat_messages import ChatMessage
from polymoe.server.protocol import ChatCompletionRequest, Ignored

MAX_COUNT = 2**31 - 1
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS, fail_fast=True)
]


class TurnRequest(Ignored):
    """The second half of the fields are this server's own, in both APIs."""

    # Field of a chat -> what this API calls it, for errors.
    names: ClassVar[Mapping[str, str]] = {}

    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_COUNT)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = Field(None, max_length=256)
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    slo_class: str | None = Field(None, min_length=1, max_length=64)

    _chat: ChatCompletionRequest | None = PrivateAttr(None)

    @model_validator(mode="after")
    def convert(self) -> "TurnRequest":
        """While the body is checked, where a long one delays nobody."""
        same = {name: getattr(self, name) for name in TurnRequest.model_fields if name not in Ignored.model_fields}
        try:
            self._chat = ChatCompletionRequest.model_validate(
                {name: value for name, value in {**same, **self.chat_fields()}.items() if value is not None}
            )
        except RequestError as error:
            raise self.renamed(error) from None
        except ValidationError as error:  # a limit of chats that is none here
            first = error.errors(include_url=False)[0]
            raise self.renamed(RequestError(f"{first['msg']}.", param=str(first["loc"][0]))) from None
        return self

    @abstractmethod
    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat that are named otherwise here. Raises `RequestError`."""

    def chat(self) -> ChatCompletionRequest:
        assert self._chat is not None
        # An alias is replaced after the body was checked.
        return self._chat.model_copy(update={"model": self.model})

    @classmethod
    def renamed(cls, error: RequestError) -> RequestError:
        """With the field as this API calls it."""
        if error.param is not None:
            error.param = cls.names.get(error.param, error.param)
        return error


class Turns:
    """Puts messages together: what one answer held (reasoning, text, calls) is one message again."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._answer: dict[str, Any] = {}

    def add(self, **message: Any) -> None:
        """A message that is no answer."""
        self.end_answer()
        self.messages.append(ChatMessage.model_validate(message))

    def add_thought(self, text: str) -> None:
        if "content" in self._answer or "tool_calls" in self._answer:
            self.end_answer()
        self._answer["reasoning"] = self._answer.get("reasoning", "") + text

    def add_text(self, text: str) -> None:
        if "content" in self._answer or "tool_calls" in self._answer:
            self.end_answer()
        self._answer["content"] = text

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._answer.setdefault("tool_calls", []).append(call)

    def end_answer(self) -> None:
        if self._answer:
            self.messages.append(ChatMessage.model_validate({"role": "assistant", **self._answer}))
            self._answer = {}
