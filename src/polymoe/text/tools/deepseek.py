"""DeepSeek V3 and R1, with the arguments in a code block, and V3.1, without:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Paris"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>
<｜tool▁calls▁end｜>
"""

from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.base import MalformedCallError, Steps, ToolParser
from polymoe.text.tools.lark import Token, as_json, json_rule

_ALL, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeekParser(ToolParser):
    """V3.1."""

    name = "deepseek"
    marks = ("<｜tool▁call▁begin｜>",)
    special = (_ALL, _END, _CALL, _SEP, _CALL_END)

    def steps(self) -> Steps[None]:
        while (marker := (yield from self.text_until(_ALL, _CALL))) is not None:
            if marker == _ALL and (yield from self.accept(_CALL)) is None:
                raise MalformedCallError
            while True:
                yield from self._call()
                yield from self.accept(_CALL_END)
                if (yield from self.accept(_CALL)) is None:
                    break
            yield from self.accept(_END)

    def _call(self) -> Steps[None]:
        name = (yield from self.read_until(_SEP)).strip()
        if name == "function":  # V3
            name = (yield from self.read_until("```json")).strip()
        index = yield from self.begin(name)
        yield from self.json_value(index)
        yield from self.accept("```")

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        names = [f"call_{i}" for i in range(len(tools))]
        one = " | ".join(names)
        text = f"start: {token(_ALL)} one{'+' if parallel else ''} {token(_END)}\none: {one}\n"
        for i, (name, schema) in enumerate(tools.items()):
            text += f"call_{i}: {token(_CALL)} {cls._head(name, token)} json_{i} {cls._tail()} {token(_CALL_END)}\n"
            text += json_rule(f"json_{i}", schema or {"type": "object"})
        return text

    @classmethod
    def _head(cls, name: str, token: Token) -> str:
        return f"{as_json(name)} {token(_SEP)}"

    @classmethod
    def _tail(cls) -> str:
        return ""


class DeepSeekV3Parser(DeepSeekParser):
    """Its template writes the code block itself."""

    name = "deepseek_v3"
    marks = ("```json",)

    @classmethod
    def _head(cls, name: str, token: Token) -> str:
        return f'"function" {token(_SEP)} {as_json(name + chr(10) + "```json" + chr(10))}'

    @classmethod
    def _tail(cls) -> str:
        return '"\\n```"'
