"""What `/v1/variants` takes, and the shapes of what it answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from polymoe.server.schemas import ErrorFields
from polymoe.server.strict import Strict
from polymoe.server.variant_change import Evict, Fit

_Source = Annotated[str, Field(min_length=1, max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class ReplaceVariantRequest(Strict):
    """source: PATH, BASE+ADAPTER or BASE+PATCH below the server's --variants-root; BASE may be a variant. bits: of
    corrections on what is there, "auto": as many as there is room for; lossless without. max_kl: nats a token that may
    be lost, as predicted; the fewest bits that keep it. evict: what makes room, versions held
    for rollback ("previous"), then added ones that nobody asked for longest ("unused"). wait: answer when done."""

    source: _Source
    bits: Annotated[int, Field(ge=1, le=5)] | Literal["auto"] | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = None
    evict: Evict | None = None
    wait: bool | None = None

    @property
    def fit(self) -> Fit:
        return Fit(0 if isinstance(self.bits, str) else self.bits, self.max_kl)


class AddVariantRequest(ReplaceVariantRequest):
    name: _Name


class AliasRequest(Strict):
    """to: a variant, or name@version."""

    to: _Name


class PinRequest(Strict):
    pinned: bool | None = None  # default true


class ReplanRequest(Strict):
    """policy, memory: as of `polymoe plan`; default those of the bundle. wait: answer when it is done."""

    policy: _Name | None = None
    memory: _Name | None = None
    wait: bool | None = None


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
    """How far a change is. name: "-" of one that is about all variants."""

    object: Literal["variant.change"]
    name: str
    kind: Literal["add", "replace", "remove", "replan"]
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
