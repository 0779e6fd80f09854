"""OpenAI's rules of `strict: true`: what its own clients make passes, and what breaks a rule is told where."""

from typing import Any, Literal

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel

from polymoe.errors import RequestError
from polymoe.server.chat_messages import Function
from polymoe.server.strict_schema import check_strict
from polymoe.server.structure_fields import JsonSchema

GOOD: dict[str, Any] = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


class Leaf(BaseModel):
    kind: Literal["a", "b"]
    weight: float | None


class Tree(BaseModel):
    name: str
    leaves: list[Leaf]
    below: list["Tree"]
    other: Leaf | int


def test_what_openais_client_makes_passes() -> None:
    check_strict(to_strict_json_schema(Tree), "response_format 'Tree'", "response_format")


def nested(inner: dict[str, Any]) -> dict[str, Any]:
    items = {"type": "array", "items": {"anyOf": [{"type": "string"}, inner]}}
    return {**GOOD, "properties": {"a": items}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array"}, "In context=(), schema must be a JSON Schema of 'type: \"object\"'"),
        ({"anyOf": [GOOD], "type": "object"}, "In context=(), schema must be"),
        ({"type": "object", "properties": {}}, "In context=(), 'additionalProperties' is required to be supplied"),
        ({**GOOD, "additionalProperties": {}}, "'additionalProperties' is required to be supplied and to be false"),
        ({**GOOD, "properties": {"x": {}}}, "In context=(), 'required' is required to be supplied and to be an array"),
        ({**GOOD, "properties": {"x": {}}}, "Missing 'x'"),
        ({**GOOD, "required": ["y"]}, "Extra required key 'y' supplied"),
        (nested({"type": "object"}), "In context=('properties', 'a', 'items', 'anyOf', '1'), 'additionalProperties'"),
        (nested({"allOf": [GOOD]}), "In context=('properties', 'a', 'items', 'anyOf', '1'), 'allOf' is not permitted"),
        ({**GOOD, "$defs": {"b": {"type": ["object", "null"]}}}, "In context=('$defs', 'b'), 'additionalProperties'"),
    ],
)
def test_what_breaks_a_rule_is_told_where(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as of_tool:
        Function(name="look", parameters=schema, strict=True)
    with pytest.raises(RequestError) as of_answer:
        JsonSchema.model_validate({"name": "look", "schema": schema, "strict": True})
    for error, param in ((of_tool.value, "tools"), (of_answer.value, "response_format")):
        assert says in str(error)
        assert "'look'" in str(error)
        assert (error.param, error.code) == (param, "invalid_json_schema")
    Function(name="look", parameters=schema)
    JsonSchema.model_validate({"name": "look", "schema": schema, "strict": False})


def test_a_deep_schema_is_no_recursion() -> None:
    schema: dict[str, Any] = {**GOOD}
    for _ in range(5000):
        schema = {**GOOD, "properties": {"a": schema}, "required": ["a"]}
    check_strict(schema, "response_format 'deep'", "response_format")
