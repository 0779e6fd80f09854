"""What a server and the planner beside it say to each other, as lines of JSON."""

import msgspec

from polymoe.bundle.live import Addition
from polymoe.bundle.manifest import FileRecord


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """Plan checkpoint `spec` as variant `name` of a served bundle, into the empty folder."""

    bundle: str
    name: str
    spec: str
    folder: str
    free_bytes: int | None = None  # on the device
    bits: int | None = None  # of corrections; None: lossless; 0: as many as there is room for
    max_kl: float | None = None  # nats a token that may be lost, as predicted: the fewest bits that keep it


class RankJob(msgspec.Struct, frozen=True, kw_only=True, tag="rank"):
    """How far is checkpoint `spec` from what each of these bundles could share with it?"""

    bundles: list[str]
    name: str
    spec: str


class PlanJob(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """Plan checkpoints, name -> spec, as a new bundle `out`, which may be replaced."""

    specs: dict[str, str]
    policy: str
    memory: str | None
    out: str


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a job is; the last one is `done`, with the addition if it made one, or has an error. `deliberate`: one
    whose message is for users. distances: bundle -> relative distance; refusals: bundle -> why it does not fit."""

    stage: str
    fraction: float
    done: bool = False
    addition: Addition | None = None
    files: list[FileRecord] = []
    notes: list[str] = []
    distances: dict[str, float] = {}
    refusals: dict[str, str] = {}
    error: str | None = None
    deliberate: bool = True
