"""DeepSeek V3.2 and, with `tool_calls` as the outer tag, V4: each argument says whether it is text.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
"""

import re
from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.arguments import is_string, properties, typed
from polymoe.text.tools.base import Arguments, MalformedCallError, Steps, ToolParser
from polymoe.text.tools.lark import Token, as_json, json_rule

_D = "｜DSML｜"
_INVOKE, _INVOKE_END = f'<{_D}invoke name="', f"</{_D}invoke>"
_PARAMETER, _PARAMETER_END = f'<{_D}parameter name="', f"</{_D}parameter>"


class DeepSeekV32Parser(ToolParser):
    name = "deepseek_v32"
    marks = (f"<{_D}function_calls>",)
    special = (_D,)
    outer = "function_calls"

    def steps(self) -> Steps[None]:
        while (yield from self.text_until(f"<{_D}{self.outer}>")) is not None:
            if (yield from self.accept(_INVOKE)) is None:
                raise MalformedCallError
            while True:
                yield from self._invoke()
                if (yield from self.accept(_INVOKE)) is None:
                    break
            yield from self.accept(f"</{_D}{self.outer}>")

    def _invoke(self) -> Steps[None]:
        name = yield from self.read_until('">')
        index = yield from self.begin(name)
        schemas = properties(self.tools.get(name, {}))
        before = "{"
        while (yield from self.accept(_PARAMETER)) is not None:
            key = yield from self.read_until('"')
            kind = yield from self.read_until(">")
            yield Arguments(index, f"{before}{as_json(key)}: ")
            before = ", "
            schema = schemas.get(key, {})
            if 'string="true"' in kind or ("string=" not in kind and is_string(schema)):
                yield Arguments(index, '"')
                yield from self.stream_until(index, _PARAMETER_END)
                yield Arguments(index, '"')
            else:
                yield Arguments(index, typed((yield from self.read_until(_PARAMETER_END)).strip(), schema))
        if before == "{" and self._buffer.startswith("{"):  # all arguments at once, as JSON
            yield from self.json_value(index)
        else:
            yield Arguments(index, "{}" if before == "{" else "}")
        yield from self.accept(_INVOKE_END)

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        def tag(text: str) -> str:
            parts = re.split(f"({_D})", text)
            return " ".join(token(_D) if part == _D else as_json(part) for part in parts if part)

        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        opened, closed = tag(f"<{_D}{cls.outer}>\n"), tag(f"</{_D}{cls.outer}>")
        text = f"start: {opened} one{'+' if parallel else ''} {closed}\none: {calls}\n"
        text += _text_before_end(token)
        end = tag(f"{_PARAMETER_END}\n")
        for i, (name, schema) in enumerate(tools.items()):
            parts = []
            for j, (key, value) in enumerate(properties(schema).items()):
                is_text = is_string(value)
                head = tag(f'{_PARAMETER}{key}" string="{"true" if is_text else "false"}">')
                if is_text and "enum" not in value:
                    text += f'p_{i}_{j}: {head} string "\\n"\n'
                elif is_text:
                    options = " | ".join(as_json(option) for option in value["enum"])
                    text += f"p_{i}_{j}: {head} ({options}) {end}\n"
                else:
                    text += f"p_{i}_{j}: {head} v_{i}_{j} {end}\n" + json_rule(f"v_{i}_{j}", value)
                parts.append(f"p_{i}_{j}" if key in schema.get("required", ()) else f"p_{i}_{j}?")
            inside = "".join(f" {part}" for part in parts)
            text += f"call_{i}: {tag(f'{_INVOKE}{name}{chr(34)}>{chr(10)}')}{inside} {tag(f'{_INVOKE_END}{chr(10)}')}\n"
        return text


def _text_before_end(token: Token) -> str:
    """Lark's rule `string`: any text, and the end of the parameter."""
    if _D not in token.special:
        return token.text_before(_PARAMETER_END, "string")
    # No text contains the special token, but the end begins with what a text may contain.
    return f'string: (PLAIN | LESS)* LESS "/" {token(_D)} "parameter>"\nPLAIN: /[^<]+/\nLESS: /</\n'


class DeepSeekV4Parser(DeepSeekV32Parser):
    name = "deepseek_v4"
    marks = (f"<{_D}tool_calls>",)
    outer = "tool_calls"
