"""GLM 4.5 and later: keys and values in turn; strings are written as they are.

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Beijing</arg_value>
</tool_call>
"""

from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.arguments import is_string, properties, typed
from polymoe.text.tools.base import Arguments, MalformedCallError, Steps, ToolParser
from polymoe.text.tools.lark import Token, as_json, json_rule, rules


class GlmXmlParser(ToolParser):
    name = "glm_xml"
    marks = ("<arg_key>",)
    special = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def steps(self) -> Steps[None]:
        while (yield from self.text_until("<tool_call>")) is not None:
            name = yield from self._name()
            index = yield from self.begin(name)
            schemas = properties(self.tools.get(name, {}))
            before = "{"
            while (yield from self.accept("<arg_key>")) is not None:
                key = (yield from self.read_until("</arg_key>")).strip()
                if (yield from self.accept("<arg_value>")) is None:
                    raise MalformedCallError
                yield Arguments(index, f"{before}{as_json(key)}: ")
                before = ", "
                schema = schemas.get(key, {})
                if is_string(schema):
                    yield Arguments(index, '"')
                    yield from self.stream_until(index, "</arg_value>")
                    yield Arguments(index, '"')
                else:
                    yield Arguments(index, typed((yield from self.read_until("</arg_value>")).strip(), schema))
            yield Arguments(index, "{}" if before == "{" else "}")
            yield from self.accept("</tool_call>")

    def _name(self) -> Steps[str]:
        """Up to the first tag or the line's end, which newer models leave out."""
        while not any(end in self._buffer.lstrip() for end in ("\n", "<")):
            if self._closed:
                raise MalformedCallError
            yield None
        self._skip_space()
        end = min(at for at in (self._buffer.find("\n"), self._buffer.find("<")) if at >= 0)
        name = self._take(end).strip()
        if not name:
            raise MalformedCallError
        return name

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        key_begin, key_end, begin, end = map(token, ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))
        text = rules([f"call_{i}" for i in range(len(tools))], parallel)
        text += token.text_before("</arg_value>", "string")
        for i, (name, schema) in enumerate(tools.items()):
            parts = []
            for j, (key, value) in enumerate(properties(schema).items()):
                head = f'{key_begin} {as_json(key)} {key_end} "\\n" {begin}'
                if is_string(value) and "enum" not in value:
                    text += f'p_{i}_{j}: {head} string "\\n"\n'
                elif is_string(value):
                    options = " | ".join(as_json(option) for option in value["enum"])
                    text += f'p_{i}_{j}: {head} ({options}) {end} "\\n"\n'
                else:
                    text += f'p_{i}_{j}: {head} v_{i}_{j} {end} "\\n"\n' + json_rule(f"v_{i}_{j}", value)
                parts.append(f"p_{i}_{j}" if key in schema.get("required", ()) else f"p_{i}_{j}?")
            opened, closed = token("<tool_call>"), token("</tool_call>")
            text += f"call_{i}: {opened} {as_json(name + chr(10))} {' '.join(parts)} {closed}\n"
        return text
