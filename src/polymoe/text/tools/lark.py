"""What the grammars of all formats are made of, in Lark as llguidance reads it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SPACE = r"[\x20\x0A]{1,4}"


class Token:
    """How a grammar writes a marker: as a special token, or as text where it is none.

    Args: special: special token -> id.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = special

    def __call__(self, marker: str) -> str:
        return f"<[{self.special[marker]}]>" if marker in self.special else as_json(marker)

    def text_before(self, marker: str, name: str) -> str:
        """A rule `name` for any text with the marker at its end."""
        if marker in self.special:  # text cannot contain it
            return f"{name}: {name.upper()} {self(marker)}\n{name.upper()}: /(?s:.*)/\n"
        return f"{name}[lazy]: /(?s:.*){re.escape(marker).replace('/', chr(92) + '/')}/\n"


def rules(calls: Sequence[str], parallel: bool, between: str = '"\\n"') -> str:
    """Lark's rule for one of the calls (rules of their own), or for several."""
    one = " | ".join(calls)
    return f"start: one ({between} one)*\none: {one}\n" if parallel else f"start: {one}\n"


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """A rule for JSON that follows a schema, nearly as densely as the templates write it."""
    return f"{name}: %json {as_json({'x-guidance': {'whitespace_pattern': _SPACE}} | dict(schema))}\n"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
