"""Harmony, the format of gpt-oss: messages, each with a channel.

    <|channel|>analysis<|message|>The user asks …<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather
    <|constrain|>json<|message|>{"city": "Paris"}<|call|>
    <|channel|>final<|message|>It is sunny.<|return|>

openai-harmony reads it from token ids, with a vocabulary that it downloads and whose hash it compares; a variant may
have another, and this server downloads nothing, so the text is read here.
"""

import re
from collections.abc import Mapping
from typing import Any

from polymoe.text.tools.base import Arguments, Event, Steps, Text, Thought, ToolParser
from polymoe.text.tools.lark import Token, as_json, json_rule

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyParser(ToolParser):
    name = "harmony"
    marks = ("<|channel|>",)
    special = ("<|channel|>", "<|message|>", "<|constrain|>", *_ENDS)

    def steps(self) -> Steps[None]:
        """Header, message, header, message …; text without a header is the answer itself."""
        while (marker := (yield from self.text_until("<|start|>", "<|channel|>", *_ENDS))) is not None:
            if marker not in ("<|start|>", "<|channel|>"):
                continue
            header = yield from self.read_until("<|message|>")
            if (called := _RECIPIENT.search(header)) is not None:
                index = yield from self.begin(called[1])
                yield from self._until(_ENDS, lambda text, index=index: self._give(Arguments(index, text)))
            elif "analysis" in header:
                self._raw = None
                yield from self._until(_ENDS, lambda text: self._give(Thought(text)))
            else:
                self._raw = None
                yield from self._until(_ENDS, lambda text: self._give(Text(text)))

    @staticmethod
    def _give(event: Event) -> Steps[None]:
        yield event

    @classmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: Token) -> str:
        """One call: its end is the end of the answer. Thoughts may come first."""
        del parallel
        channel, message = token("<|channel|>"), token("<|message|>")
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        text = f"start: (thought)? ({calls})\n" + cls._thought(token)
        for i, (name, schema) in enumerate(tools.items()):
            head = as_json(f"commentary to=functions.{name} ")
            text += f'call_{i}: {channel} {head} {token("<|constrain|>")} "json" {message} json_{i}\n'
            text += json_rule(f"json_{i}", schema or {"type": "object"})
        return text

    @classmethod
    def before_answer(cls, token: Token) -> tuple[str, str]:
        """A grammar of what comes before the text of an answer, for `answer_after`."""
        return f'(thought)? {token("<|channel|>")} "final" {token("<|message|>")}', cls._thought(token)

    @staticmethod
    def _thought(token: Token) -> str:
        head = f'{token("<|channel|>")} "analysis" {token("<|message|>")}'
        return f'thought: {head} inner {token("<|start|>")} "assistant"\n' + token.text_before("<|end|>", "inner")
