"""OpenAI's rules for a JSON schema with `strict: true`, which are narrower than what can be followed here.

Every member of an object is required and no other is allowed, so that whoever reads an answer finds in it what the
schema names. How large a schema may be is not one of these rules: `text/grammar.py` has limits of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from polymoe.errors import RequestError
from polymoe.server.errors import printable

_REFUSED = (
    "oneOf", "allOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "patternProperties",
    "propertyNames", "unevaluatedProperties", "prefixItems", "contains",
)  # fmt: skip
_MOST_SCHEMAS = 20_000  # looked at; the rest of a larger one is for the compiler to refuse
_SHOWN = 200  # characters of a place

Place = tuple[str, ...]  # names and numbers on the way from the root


def check_strict(schema: Mapping[str, Any], what: str, param: str) -> None:
    """Raises `RequestError`, in OpenAI's words, where a schema breaks a rule.

    Args: what: the schema belongs to, for the message.
    """
    if schema.get("type") != "object" or "anyOf" in schema:
        kind = "anyOf" if "anyOf" in schema else schema.get("type")
        raise _wrong(what, param, (), f"schema must be a JSON Schema of 'type: \"object\"', got 'type: {kind!r}'")
    for count, (place, found) in enumerate(_schemas(schema)):
        if count >= _MOST_SCHEMAS:
            return
        if fault := _fault(found):
            raise _wrong(what, param, place, fault)


def _fault(schema: Mapping[str, Any]) -> str | None:
    for keyword in _REFUSED:
        if keyword in schema:
            return f"'{keyword}' is not permitted"
    kind = schema.get("type")
    if "properties" not in schema and kind != "object" and not (isinstance(kind, list) and "object" in kind):
        return None
    if schema.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    names = properties if isinstance(properties, dict) else {}
    known = required if isinstance(required, list) else []
    rule = "'required' is required to be supplied and to be an array including every key in properties."
    for name in names:
        if name not in known:
            return f"{rule} Missing '{name[:_SHOWN]}'"
    for name in known:
        if name not in names:
            return f"{rule} Extra required key '{str(name)[:_SHOWN]}' supplied"
    return None


def _schemas(root: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Each schema within another, the root first, and where it is."""
    left: list[tuple[Place, Any]] = [((), root)]
    while left:
        place, schema = left.pop()
        if not isinstance(schema, dict):
            continue
        yield place, schema
        inner: list[tuple[Place, Any]] = [((*place, "items"), schema.get("items"))]
        for keyword in ("properties", "$defs", "definitions"):
            if isinstance(named := schema.get(keyword), dict):
                inner += [((*place, keyword, name), value) for name, value in named.items()]
        if isinstance(options := schema.get("anyOf"), list):
            inner += [((*place, "anyOf", str(k)), value) for k, value in enumerate(options)]
        left += reversed(inner)


def _wrong(what: str, param: str, place: Place, fault: str) -> RequestError:
    where = printable(f"({', '.join(repr(step) for step in place)})"[:_SHOWN])
    return RequestError(
        f"Invalid schema for {what}: In context={where}, {printable(fault)}. With strict: false the schema is followed "
        "as it is.",
        param=param,
        code="invalid_json_schema",
    )
