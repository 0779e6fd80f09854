"""One change of the set of variants, and what it makes of the bundle's folder."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from polymoe.bundle.live import ADDITIONS, Addition, LiveState
from polymoe.bundle.manifest import FileRecord, Manifest
from polymoe.errors import RequestError


@dataclass(eq=False)
class Change:
    """One change, as its progress is shown. `state`: planning, loading, writing, draining, done or failed."""

    name: str
    kind: str  # add, replace, remove
    state: str = "planning"
    stage: str = ""
    fraction: float = 0.0
    version: str | None = None
    error: RequestError | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return self.state not in ("done", "failed")

    def set_progress(self, stage: str, fraction: float) -> None:
        self.stage, self.fraction = stage, fraction


def rename_addition(folder: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)  # of a change that was undone
    folder.rename(final)


def with_state(manifest: Manifest, state: LiveState, addition: Addition | None, files: list[FileRecord]) -> Manifest:
    """The manifest with another state: additions that it does not want go, and their files."""
    known = [*manifest.live_state.additions, *([] if addition is None else [addition])]
    additions = [found for found in known if found.version in state.wanted]
    kept = tuple(f"{found.folder}/" for found in additions)
    planned = [record for record in manifest.files if not record.path.startswith(f"{ADDITIONS}/")]
    added = [record for record in (*manifest.files, *files) if record.path.startswith(kept)]
    removed = [v.version for v in manifest.variants if v.version not in state.wanted]
    live = msgspec.structs.replace(state, additions=additions, removed=sorted(set(removed)))
    return msgspec.structs.replace(manifest, live=live, files=[*planned, *added], format_version=3)
