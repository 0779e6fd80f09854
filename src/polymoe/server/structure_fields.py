"""The fields that say what an answer has to look like."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polymoe.errors import RequestError
from polymoe.protocol.structured_outputs import MAX_CHOICES, StructuredOutputsParams
from polymoe.server.errors import printable
from polymoe.server.known_fields import OF_STRUCTURED_OUTPUTS
from polymoe.server.strict import Strict
from polymoe.server.strict_schema import check_strict


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # None: any object
    strict: bool | None = None  # the schema holds either way; true: it has to keep OpenAI's rules

    @model_validator(mode="after")
    def check_rules(self) -> "JsonSchema":
        if self.strict and self.schema_ is not None:
            check_strict(self.schema_, f"response_format '{printable(self.name)}'", "response_format")
        return self


class ResponseFormat(Strict):
    """OpenAI's way to say what an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format needs json_schema where its type is json_schema, and only there.",
                param="response_format",
            )
        return self

    def params(self) -> StructuredOutputsParams | None:
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.schema_
        return StructuredOutputsParams(json_object=True) if schema is None else StructuredOutputsParams(json=schema)


class StructuredOutputs(Strict):
    """vLLM's way."""

    unsupported = OF_STRUCTURED_OUTPUTS

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None

    def params(self) -> StructuredOutputsParams:
        return StructuredOutputsParams(
            json=self.json_,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=self.json_object,
            disable_any_whitespace=bool(self.disable_any_whitespace),
        )
