"""What an answer has to look like; field names follow vLLM's class of the same name."""

from typing import Any

import msgspec

from polymoe.errors import RequestError

MAX_CHOICES = 4096


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """One of the first five says what the answer is.

    Raises `RequestError` for none or several of them. Whether a schema, an expression or a grammar can be used is found
    out when it is compiled.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema, as text or as it is
    regex: str | None = None  # Rust's syntax; the whole answer matches
    choice: list[str] | None = None
    grammar: str | None = None  # Lark as llguidance reads it, or GBNF
    json_object: bool | None = None  # True: any JSON object
    disable_any_whitespace: bool = False  # JSON without any between its tokens

    def __post_init__(self) -> None:
        kinds = [k for k in ("json", "regex", "choice", "grammar") if getattr(self, k) is not None]
        kinds += ["json_object"] if self.json_object else []
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none of them"
            raise _wrong(f"structured_outputs needs one of json, regex, choice, grammar and json_object, got {given}.")
        if self.choice is not None and not (
            0 < len(self.choice) <= MAX_CHOICES and all(isinstance(text, str) and text for text in self.choice)
        ):
            raise _wrong(f"choice must be 1 to {MAX_CHOICES} texts that are not empty.")


def _wrong(message: str) -> RequestError:
    return RequestError(message, param="structured_outputs")
