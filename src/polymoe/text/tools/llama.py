"""Llama 3.1 to 4: an answer that is nothing but JSON, where the template asks for it.

{"name": "get_weather", "parameters": {"city": "Paris"}}
"""

from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.base import MalformedCallError, Steps, ToolParser
from polymoe.text.tools.hermes import call_schema
from polymoe.text.tools.lark import Token, json_rule, rules

_TAG = "<|python_tag|>"  # before the calls, or left out


class LlamaParser(ToolParser):
    """JSON that names none of the tools is the answer itself."""

    name = "llama"
    marks = ('"parameters": dictionary of argument name',)
    special = (_TAG,)

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(tools)
        self._begun = False

    def steps(self) -> Steps[None]:
        if not self._begun:
            self._begun, self._raw = True, ""
            if (yield from self.accept(_TAG)) is None and not self._buffer.startswith("{"):
                raise MalformedCallError
            yield from self._calls()
        while (yield from self.text_until(_TAG)) is not None:
            yield from self._calls()

    def _calls(self) -> Steps[None]:
        while True:
            yield from self.json_call(("parameters", "arguments"))
            if (yield from self.accept(";")) is None:
                return

    def begin(self, name: str) -> Steps[int]:
        if name not in self.tools:
            raise MalformedCallError
        return (yield from super().begin(name))

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        del token
        calls = [
            json_rule(f"json_{i}", call_schema(name, schema, "parameters"))
            for i, (name, schema) in enumerate(tools.items())
        ]
        return rules([f"json_{i}" for i in range(len(tools))], parallel, between='"; "') + "".join(calls)
