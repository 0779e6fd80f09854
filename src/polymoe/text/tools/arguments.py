"""Arguments of calls, and what their schemas say of them."""

import json
from collections.abc import Mapping
from typing import Any


def typed(value: str, schema: Mapping[str, Any]) -> str:
    """The JSON of an argument that a format writes as text: what its schema calls a string stays one."""
    if is_string(schema):
        return json.dumps(value, ensure_ascii=False)
    try:
        return json.dumps(json.loads(value), ensure_ascii=False)
    except ValueError:
        if value in ("True", "False", "None"):
            return {"True": "true", "False": "false", "None": "null"}[value]
        return json.dumps(value, ensure_ascii=False)


def is_string(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type")
    if kinds is None and "enum" in schema:
        return all(isinstance(value, str) for value in schema["enum"])
    return kinds == "string" or (isinstance(kinds, list) and set(kinds) <= {"string", "null"} and "string" in kinds)


def properties(schema: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Argument -> its schema."""
    found = schema.get("properties")
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}
