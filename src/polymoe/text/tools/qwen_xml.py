"""Qwen3-Coder, Qwen 3.5: an element for each argument; strings are written as they are.

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.arguments import is_string, properties, typed
from polymoe.text.tools.base import Arguments, MalformedCallError, Steps, ToolParser
from polymoe.text.tools.lark import Token, as_json, json_rule, rules


class QwenXmlParser(ToolParser):
    name = "qwen_xml"
    marks = ("<function=",)
    special = ("<tool_call>", "</tool_call>")

    def steps(self) -> Steps[None]:
        # The models leave out the outer tag now and then.
        while (marker := (yield from self.text_until("<tool_call>", "<function="))) is not None:
            if marker == "<tool_call>" and (yield from self.accept("<function=")) is None:
                raise MalformedCallError
            yield from self._function()
            yield from self.accept("</tool_call>")

    def _function(self) -> Steps[None]:
        name = (yield from self.read_until(">")).strip()
        index = yield from self.begin(name)
        schemas = properties(self.tools.get(name, {}))
        before = "{"
        while (yield from self.accept("<parameter=")) is not None:
            key = (yield from self.read_until(">")).strip()
            yield Arguments(index, f"{before}{as_json(key)}: ")
            before = ", "
            yield from self._value(index, schemas.get(key, {"type": "string"}))
        yield Arguments(index, "{}" if before == "{" else "}")
        yield from self.accept("</function>")

    def _value(self, index: int, schema: Mapping[str, Any]) -> Steps[None]:
        if not is_string(schema):
            yield Arguments(index, typed((yield from self.read_until("</parameter>")).strip(), schema))
            return
        while not self._buffer and not self._closed:
            yield None
        if self._buffer.startswith("\n"):
            self._take(1)
        yield Arguments(index, '"')
        yield from self.stream_until(index, "\n</parameter>")
        yield Arguments(index, '"')

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        opened, closed = token("<tool_call>"), token("</tool_call>")
        text = rules([f"call_{i}" for i in range(len(tools))], parallel)
        text += "string[lazy]: /(?s:.*)\\n<\\/parameter>\\n/\n"  # never special tokens
        for i, (name, schema) in enumerate(tools.items()):
            parts = []
            for j, (key, value) in enumerate(properties(schema).items()):
                head = as_json(f"<parameter={key}>\n")
                if is_string(value) and "enum" not in value:
                    rule = f"p_{i}_{j}: {head} string\n"
                elif is_string(value):
                    options = " | ".join(as_json(option) for option in value["enum"])
                    rule = f'p_{i}_{j}: {head} ({options}) "\\n</parameter>\\n"\n'
                else:
                    rule = f'p_{i}_{j}: {head} v_{i}_{j} "\\n</parameter>\\n"\n' + json_rule(f"v_{i}_{j}", value)
                text += rule
                parts.append(f"p_{i}_{j}" if key in schema.get("required", ()) else f"p_{i}_{j}?")
            head = as_json(f"\n<function={name}>\n")
            text += f'call_{i}: {opened} {head} {" ".join(parts)} "</function>\\n" {closed}\n'
        return text
