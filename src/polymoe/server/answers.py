"""A chat's answer as clients read it: reasoning, text and tool calls, told apart while it is written."""

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from polymoe.errors import RequestError
from polymoe.protocol.request import SamplingParams
from polymoe.protocol.structured_outputs import StructuredOutputsParams
from polymoe.server.chat_messages import NamedTool
from polymoe.server.protocol import ChatCompletionRequest
from polymoe.text.grammar import answer_after
from polymoe.text.reasoning import ReasoningMarks, ReasoningSplitter, reasoning_marks
from polymoe.text.tokenizer import VariantTokenizer
from polymoe.text.tools.base import Arguments, Call, Event, Text, Thought, ToolParser
from polymoe.text.tools.choose import TOOL_PARSERS, choose_tool_parser
from polymoe.text.tools.harmony import HarmonyParser
from polymoe.text.tools.lark import Token

_PROMPT_END = 256  # tokens in which a template that begins the reasoning does it
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class AnswerPart:
    """What a piece of text turned out to be; `calls` as they are sent in a stream."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to one request are read."""

    parser: type[ToolParser] | None
    tools: Mapping[str, Mapping[str, Any]]  # name -> schema of the arguments
    marks: ReasoningMarks | None
    is_open: bool = False  # the prompt ends within the reasoning
    include_reasoning: bool = True
    parallel: bool = True
    forced: bool = False  # there has to be a call
    named: bool = False  # and the client said which

    @property
    def is_plain(self) -> bool:
        """All text is the answer."""
        return self.parser is None and self.marks is None

    @property
    def thinks(self) -> bool:
        return self.marks is not None or self.parser is HarmonyParser

    def reader(self) -> "AnswerReader":
        """For one of the choices."""
        return AnswerReader(self)

    def constrained(self, sampling: SamplingParams, special: Mapping[str, int]) -> SamplingParams:
        """With what the format needs: its markers in the text, calls where they are forced, and whatever the answer has
        to look like only after the reasoning."""
        if self.is_plain:
            return sampling
        wanted = sampling.structured_outputs
        if self.forced and self.parser is not None:
            grammar = self.parser.grammar(self.tools, self.parallel, Token(special))
            wanted = StructuredOutputsParams(grammar=grammar)
        elif wanted is not None and self.parser is HarmonyParser:
            wanted = answer_after(wanted, *HarmonyParser.before_answer(Token(special)))
        if wanted is not None and self.is_open and self.marks is not None:
            wanted = answer_after(wanted, *self.marks.rest_of_thought(Token(special)))
        marks = [*(self.parser.special if self.parser is not None else ())]
        marks += [self.marks.begin, self.marks.end] if self.marks is not None else []
        shown = sampling.skip_special_tokens and not any(mark in special for mark in marks)
        return msgspec.structs.replace(sampling, structured_outputs=wanted, skip_special_tokens=shown)


def answer_format(body: ChatCompletionRequest, template: str, chosen: str | None) -> AnswerFormat:
    """Args: template: the variant's. chosen: its tool parser, where the operator says which.

    Raises `RequestError` for tools that the variant cannot be told of, or whose calls cannot be read.
    """
    parser = TOOL_PARSERS[chosen] if chosen is not None else choose_tool_parser(template)
    tools = {tool.function.name: tool.function.parameters or {} for tool in body.callable_tools}
    if tools and "tools" not in template:
        raise RequestError(
            f"The chat template of `{body.model}` does not read tools, so that the model would not know of them.",
            param="tools",
        )
    if tools and parser is None:
        raise RequestError(
            f"It is not known in which format `{body.model}` writes tool calls; the server has to be started with "
            f"--tool-parser {body.model}=FORMAT (one of {', '.join(TOOL_PARSERS)}).",
            param="tools",
        )
    if isinstance(body.tool_choice, NamedTool):
        tools = {body.tool_choice.function.name: tools[body.tool_choice.function.name]}
    harmony = parser is HarmonyParser
    return AnswerFormat(
        parser=parser if tools or harmony else None,
        tools=tools,
        marks=None if harmony else reasoning_marks(template),
        include_reasoning=body.include_reasoning is not False,
        parallel=body.parallel_tool_calls is not False,
        forced=bool(tools) and body.tool_choice not in (None, "auto"),
        named=isinstance(body.tool_choice, NamedTool),
    )


def opened(form: AnswerFormat, tokenizer: VariantTokenizer, token_ids: list[int]) -> AnswerFormat:
    """`form` for this prompt."""
    if form.marks is None:
        return form
    end = tokenizer.decode(token_ids[-_PROMPT_END:], skip_special_tokens=False)
    return replace(form, is_open=form.marks.is_open(end))


class AnswerReader:
    """Reads the text of one choice as it comes."""

    def __init__(self, form: AnswerFormat) -> None:
        self._form = form
        self._splitter = None if form.marks is None else ReasoningSplitter(form.marks, form.is_open)
        self._parser = None if form.parser is None else form.parser(form.tools)
        self.num_calls = 0

    def read(self, text: str, last: bool) -> list[Event]:
        """What the text turned out to be, in its order. `last`: this is the end of the answer."""
        thoughts = ""
        if self._splitter is not None:
            thoughts, text = self._splitter.push(text, last)
        events: list[Event] = [Thought(thoughts)] if thoughts else []
        if self._parser is not None:
            events += self._parser.push(text) + (self._parser.finish() if last else [])
        elif text:
            events.append(Text(text))
        shown = [event for event in events if self._is_shown(event)]
        self.num_calls += sum(isinstance(event, Call) for event in shown)
        return shown

    def push(self, text: str, last: bool) -> AnswerPart:
        """The same, sorted by what it is."""
        events = self.read(text, last)
        content = "".join(event.text for event in events if isinstance(event, Text))
        thoughts = "".join(event.text for event in events if isinstance(event, Thought))
        return AnswerPart(content, thoughts, self._calls(events))

    def finish_reason(self, reason: str | None) -> str | None:
        """As OpenAI has it: a call that the client demanded by name is no reason."""
        return "tool_calls" if reason == "stop" and self.num_calls and not self._form.named else reason

    def _calls(self, events: list[Event]) -> list[dict[str, Any]]:
        """The pieces of one call in one entry."""
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, Call):
                function = {"name": event.name, "arguments": ""}
                calls[event.index] = {
                    "index": event.index, "id": self.call_id(), "type": "function", "function": function
                }  # fmt: skip
            elif isinstance(event, Arguments):
                call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        return list(calls.values())

    def _is_shown(self, event: Event) -> bool:
        if isinstance(event, Thought):
            return self._form.include_reasoning
        return isinstance(event, Text) or event.index == 0 or self._form.parallel

    def call_id(self) -> str:
        """Templates of Mistral take nothing but nine letters and digits."""
        if self._form.parser is not None and self._form.parser.name.startswith("mistral"):
            return "".join(secrets.choice(_ALPHABET) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
