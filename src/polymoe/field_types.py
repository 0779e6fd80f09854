"""Whether the fields of a record hold what their annotations say: msgspec checks what it decodes, not what Python code
constructs."""

import types
import typing
from functools import cache
from typing import Any

import msgspec


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[tuple[str, Any, frozenset[type]], ...]:
    """(name, annotation, classes whose values are right without a closer look) of each field."""
    hints = ((field.name, _bare(field.type)) for field in msgspec.structs.fields(kind))
    return tuple((name, hint, frozenset(_plain(hint))) for name, hint in hints)


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _plain(hint: Any) -> set[type]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return set().union(*(_plain(part) for part in typing.get_args(hint)))
    if hint is float:
        return {int, float}
    return {hint} if hint in (int, str, bool, types.NoneType) else set()


def wrong_field(record: msgspec.Struct) -> tuple[str, str] | None:
    """(name, "a number or None, got 'x'") of the first field whose value is not of its type; None if there is none."""
    for name, hint, plain in _fields(type(record)):
        value = getattr(record, name)
        if value.__class__ in plain or (value.__class__ in (list, dict) and not value):
            continue
        if (wrong := wrong_value(hint, value)) is not None:
            return name, wrong
    return None


def wrong_value(hint: Any, value: Any) -> str | None:
    """`a number or None, got 'x'` for a value that is not of the type `hint`; None for one that is."""
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        given = repr(value)
        return f"{_words(hint)}, got {given if len(given) <= 200 else given[:200] + '…'}"
    return None


def _words(hint: Any) -> str:
    """An annotation in words: `float | None` -> "a number or None"."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        *others, last = typing.get_args(hint)
        return f"{', '.join(others)} or {last}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}
    if hint in names:
        return names[hint]
    parts = " to ".join(_words(part).split(" ", 1)[-1] + "s" for part in typing.get_args(hint) if part is not ...)
    kind = typing.get_origin(hint)
    return f"a {'list' if kind is tuple else kind.__name__} of {parts}"
