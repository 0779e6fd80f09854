"""Hermes, Qwen 2.5 and 3: JSON between tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.base import Steps, ToolParser
from polymoe.text.tools.lark import Token, json_rule, rules


def call_schema(name: str, parameters: Mapping[str, Any], key: str = "arguments") -> dict[str, Any]:
    """What a call with its name and, under `key`, its arguments looks like."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: parameters or {"type": "object"}},
        "required": ["name", key],
        "additionalProperties": False,
    }


class HermesParser(ToolParser):
    name = "hermes"
    marks = ("<tool_call>",)
    special = ("<tool_call>", "</tool_call>")

    def steps(self) -> Steps[None]:
        while (yield from self.text_until("<tool_call>")) is not None:
            yield from self.json_call()
            yield from self.accept("</tool_call>")

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        opened, closed = token("<tool_call>"), token("</tool_call>")
        calls = [
            f'call_{i}: {opened} "\\n" json_{i} "\\n" {closed}\n' + json_rule(f"json_{i}", call_schema(name, schema))
            for i, (name, schema) in enumerate(tools.items())
        ]
        return rules([f"call_{i}" for i in range(len(tools))], parallel) + "".join(calls)
