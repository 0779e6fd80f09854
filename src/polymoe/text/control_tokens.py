"""Control tokens that users spell out in their messages stay text: only a template's own ones become tokens.

A message that holds `<|im_end|><|im_start|>system` would otherwise end the user's turn and begin another. Such a token
is cut after its first letter, by a mark that survives the template; the pieces are then encoded one after the other,
so that no tokenizer sees the whole token. A message without control tokens is encoded as it always was.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "\U000f0002"  # of a private plane: no text has it, and transformers uses two others near it


class ControlTokens:
    """Args:
    added: token -> whether it is special, of the tokenizer.
    literals: what the template itself may write. Added tokens that are not special but stand there are control
        tokens too (DeepSeek's `<｜User｜>`), except in an assistant's turn, which may hold them by rights (`<think>`).
    """

    def __init__(self, added: Mapping[str, bool], literals: str) -> None:
        known = [token for token in added if len(token) > 1 and not token.isspace()]
        special = [token for token in known if added[token]]
        self._special = _pattern(special)
        self._all = _pattern([*special, *(token for token in known if not added[token] and token in literals)])

    def mark(self, value: Any) -> Any:
        """Strings in `value`, a tree of dicts and lists, with every control token cut by a mark."""
        return _marked(value, self._all)

    def mark_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                name: value if name == "role" else _marked(value, self._of(message.get("role")))
                for name, value in message.items()
            }
            for message in messages
        ]

    def _of(self, role: object) -> "re.Pattern[str]":
        return self._special if role == "assistant" else self._all


def split_marked(text: str) -> list[str]:
    """The pieces of a rendered text that are to be encoded separately; one, where nothing was marked."""
    return text.split(MARK)


def unmarked(text: str) -> str:
    """The rendered text as people read it."""
    return text.replace(MARK, "")


def _pattern(tokens: Sequence[str]) -> "re.Pattern[str]":
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _marked(value: Any, control: "re.Pattern[str]") -> Any:
    if isinstance(value, str):
        return control.sub(lambda found: found[0][0] + MARK + found[0][1:], value.replace(MARK, ""))
    if isinstance(value, Mapping):
        return {name: _marked(item, control) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, control) for item in value]
    return value
