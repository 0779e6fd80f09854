"""What a server and the planner beside it say to each other, as lines of JSON."""

import msgspec

from polymoe.bundle.live import Addition
from polymoe.bundle.manifest import FileRecord


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Plan checkpoint `spec` as variant `name` of a served bundle, into the empty folder."""

    bundle: str
    name: str
    spec: str
    folder: str
    free_bytes: int | None = None  # on the device
    bits: int | None = None  # of corrections; None: lossless


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a job is; the last one has the addition or an error. `deliberate`: one whose message is for users."""

    stage: str
    fraction: float
    addition: Addition | None = None
    files: list[FileRecord] = []
    notes: list[str] = []
    error: str | None = None
    deliberate: bool = True
