"""Changes of the set of variants, and what one makes of the bundle's folder."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from polymoe.bundle.live import ADDITIONS, Addition, LiveState
from polymoe.bundle.manifest import FileRecord, Manifest
from polymoe.errors import ChangeRefusedError, EngineDeadError, PolymoeError, RequestError, explain

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Change:
    """One change, as its progress is shown. `state`: planning, loading, writing, draining, done or failed."""

    name: str
    kind: str  # add, replace, remove, replan
    state: str = "planning"
    stage: str = ""
    fraction: float = 0.0
    version: str | None = None
    error: RequestError | None = None
    notes: list[str] = field(default_factory=list)
    arriving: set[str] = field(default_factory=set)  # versions, in each pool its own

    def arrives(self, version: str) -> None:
        self.arriving.add(version)
        self.version = self.version or version

    @property
    def is_open(self) -> bool:
        return self.state not in ("done", "failed")

    def set_progress(self, stage: str, fraction: float) -> None:
        self.stage, self.fraction = stage, fraction


Evict = Literal["none", "previous", "unused"]


@dataclass(frozen=True)
class Fit:
    """How exactly a variant is stored: `bits` and `max_kl` as in `Job`."""

    bits: int | None = None
    max_kl: float | None = None


class Changes:
    """Those that go on, and the last one of each name. All methods belong to one event loop."""

    def __init__(self) -> None:
        self.last: dict[str, Change] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def are_going_on(self) -> bool:
        return bool(self._tasks)

    def open_beside(self, change: Change) -> bool:
        """Whether another one goes on."""
        return any(other.is_open for other in self.last.values() if other is not change)

    def is_arriving(self, version: str) -> bool:
        """Whether a version is being added."""
        return any(change.is_open and version in change.arriving for change in self.last.values())

    def check_none(self, name: str) -> None:
        """Raises `ChangeRefusedError` where one of `name` goes on."""
        change = self.last.get(name)
        if change is not None and change.is_open:
            raise ChangeRefusedError(
                f"{name} is being changed ({change.kind}); wait until that is done.", status=409, param="name",
                code="change_in_progress",
            )  # fmt: skip

    @contextlib.contextmanager
    def reserved(self, change: Change) -> Iterator[None]:
        """Nobody else changes the name meanwhile; where it fails the change has not been. Raises as `check_none`."""
        self.check_none(change.name)
        before = self.last.get(change.name)
        self.last[change.name] = change
        try:
            yield
        except BaseException:
            if before is None:
                del self.last[change.name]
            else:
                self.last[change.name] = before
            raise

    def begin(self, change: Change, work: Coroutine[Any, Any, None]) -> Change:
        """Do `work`, and keep in `change` how it ended."""
        self.last[change.name] = change

        async def run() -> None:
            try:
                await work
                change.state, change.fraction = "done", 1.0
            except RequestError as error:
                change.state, change.error = "failed", error
            except asyncio.CancelledError:
                change.state, change.error = "failed", ChangeRefusedError("it was given up", status=503)
                raise
            except EngineDeadError:
                change.state = "failed"
                change.error = ChangeRefusedError("the engine ended; all is as before", status=503, code="engine_dead")
            except (PolymoeError, OSError) as error:
                text = explain(error) if isinstance(error, OSError) else str(error)
                change.state, change.error = "failed", ChangeRefusedError(text)
            except Exception:
                logger.exception("the change of %s failed", change.name)
                text = "the server had an internal error; all is as before"
                change.state, change.error = "failed", ChangeRefusedError(text, status=500, code="internal_error")

        task = asyncio.get_running_loop().create_task(run())
        self._tasks[change.name] = task
        task.add_done_callback(lambda done: self._tasks.pop(change.name, None) if done is task else None)
        return change

    async def wait(self, change: Change) -> None:
        """Until it is done or has failed; whoever waits may go away."""
        task = self._tasks.get(change.name)
        if task is not None:
            await asyncio.wait([task])

    async def close(self) -> None:
        """Give up what goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
