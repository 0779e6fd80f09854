"""What `/v1/variants` takes, and the shapes of what it answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from polymoe.server.schemas import ErrorFields
from polymoe.server.strict import Strict

_Source = Annotated[str, Field(min_length=1, max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class ReplaceVariantRequest(Strict):
    """source: PATH, BASE+ADAPTER or BASE+PATCH below the server's --variants-root; BASE may be a variant. bits: of
    corrections on what is there; lossless without. evict "previous": versions held for rollback make room. wait: answer
    when it is done."""

    source: _Source
    bits: Annotated[int, Field(ge=1, le=5)] | None = None
    evict: Literal["none", "previous"] | None = None
    wait: bool | None = None


class AddVariantRequest(ReplaceVariantRequest):
    name: _Name


class AliasRequest(Strict):
    """to: a variant, or name@version."""

    to: _Name


class PinRequest(Strict):
    pinned: bool | None = None  # default true


class VariantCard(BaseModel):
    """One version. names: what means it now. state: serving, held (nothing means it), draining. bytes: what only it has
    on the device; 0 of one that was planned with the bundle."""

    object: Literal["variant"]
    name: str
    version: str
    names: list[str]
    state: Literal["serving", "held", "draining"]
    pinned: bool
    previous_of: list[str]
    source: str
    bytes: int
    in_flight: int | None
    created: int
    max_model_len: int
    fidelity: dict[str, Any] | None


class VariantChange(BaseModel):
    """How far a change is."""

    object: Literal["variant.change"]
    name: str
    kind: Literal["add", "replace", "remove"]
    state: Literal["planning", "loading", "writing", "draining", "done", "failed"]
    stage: str
    fraction: float
    version: str | None
    notes: list[str]
    error: ErrorFields | None


class VariantList(BaseModel):
    """headroom: bytes for what is added; null: what is free."""

    object: Literal["list"]
    data: list[VariantCard]
    changes: list[VariantChange]
    max_variants: int
    headroom: int | None
    added_bytes: int
