"""Mistral and Mixtral: a list of JSON objects, or since the tokenizers' version 11 name and arguments in turn.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}
"""

from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.base import MalformedCallError, Steps, ToolParser
from polymoe.text.tools.hermes import call_schema
from polymoe.text.tools.lark import Token, as_json, json_rule, rules

_MARK = "[TOOL_CALLS]"


class MistralParser(ToolParser):
    name = "mistral"
    marks = (_MARK,)
    special = (_MARK, "[ARGS]", "[CALL_ID]")

    def steps(self) -> Steps[None]:
        while (yield from self.text_until(_MARK)) is not None:
            if (yield from self.accept("[")) is not None:
                yield from self._list()
            else:
                yield from self._named()

    def _list(self) -> Steps[None]:
        while (yield from self.accept("]")) is None:
            yield from self.json_call()
            yield from self.accept(",")
            if self._closed and not self._buffer:
                return

    def _named(self) -> Steps[None]:
        while "[ARGS]" not in self._buffer and "{" not in self._buffer:
            if self._closed:
                raise MalformedCallError
            yield None
        self._skip_space()
        ends = [at for at in (self._buffer.find(end) for end in ("[CALL_ID]", "[ARGS]", "{")) if at >= 0]
        name = self._take(min(ends)).strip()
        if not name:
            raise MalformedCallError
        if self._buffer.startswith("[CALL_ID]"):
            yield from self.read_until("[ARGS]")
        else:
            yield from self.accept("[ARGS]")
        index = yield from self.begin(name)
        yield from self.json_value(index)

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        text = f'start: {token(_MARK)} "[" one {"(/, ?/ one)*" if parallel else ""} "]"\n'
        text += "one: " + " | ".join(f"json_{i}" for i in range(len(tools))) + "\n"
        return text + "".join(
            json_rule(f"json_{i}", call_schema(name, schema)) for i, (name, schema) in enumerate(tools.items())
        )


class MistralNamedParser(MistralParser):
    """Since version 11."""

    name = "mistral_named"
    marks = ("[ARGS]",)

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        text = rules([f"call_{i}" for i in range(len(tools))], parallel, between='""')
        for i, (name, schema) in enumerate(tools.items()):
            text += f"call_{i}: {token(_MARK)} {as_json(name)} {token('[ARGS]')} json_{i}\n"
            text += json_rule(f"json_{i}", schema or {"type": "object"})
        return text
