"""What all request classes have in common: nothing unknown, nothing converted."""

import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from polymoe.server.errors import printable
from polymoe.server.known_fields import INSTEAD, Inert, asks_for_nothing


def _document_unsupported(schema: dict[str, Any], model: "type[Strict]") -> None:
    """The values of unsupported fields that are accepted, for the JSON schema."""
    for name, values in model.unsupported.items():
        if name not in model.model_fields:
            schema["properties"][name] = {
                "enum": list(values),
                "description": "Not supported: only what asks for nothing.",
            }


class Strict(BaseModel):
    """No unknown fields, no conversions ("1" is no number), no NaN."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=_document_unsupported,
    )
    unsupported: ClassVar[Inert] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        names = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in data.items():
            if name in names:
                kept[name] = value
            elif name not in cls.unsupported:
                raise PydanticCustomError(
                    "unknown_parameter",
                    "Unrecognized request argument supplied: {name}",
                    {"name": printable(name[:200])},
                )
            elif not asks_for_nothing(value, cls.unsupported[name]):
                allowed = " or ".join(json.dumps(value) for value in cls.unsupported[name])
                if name in INSTEAD:
                    allowed += f"; send {INSTEAD[name]} in its place"
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "{name} is not supported by this server; leave it out, or send {allowed}.",
                    {"name": name, "allowed": allowed},
                )
        return kept
