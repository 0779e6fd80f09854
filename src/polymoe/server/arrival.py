"""How a version comes into one set: planned beside the traffic, loaded between two steps, and meant by no name yet."""

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from polymoe.bundle.live import ADDITIONS, UNFINISHED, Addition
from polymoe.bundle.manifest import FileRecord
from polymoe.errors import ChangeRefusedError, PolymoeError
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.planning import Job
from polymoe.server.planner import Planner
from polymoe.server.variant_change import Change, Evict, Fit, rename_addition
from polymoe.server.variant_set import VariantSet


@dataclass(frozen=True)
class Wanted:
    """What an administrator asked for. spec: the source with real paths; source: as it was given."""

    spec: str
    source: str
    fit: Fit
    evict: Evict


@dataclass(frozen=True)
class Arrival:
    """A version that the engine holds. addition: None for one that was there before."""

    set: VariantSet
    info: VariantInfo
    addition: Addition | None = None
    files: list[FileRecord] = field(default_factory=list)


@contextlib.asynccontextmanager
async def arrived(vset: VariantSet, planner: Planner, change: Change, wanted: Wanted) -> AsyncIterator[Arrival]:
    """What is raised within takes it away again, from the engine and from the bundle's folder."""
    place = vset.folder / ADDITIONS
    await asyncio.to_thread(place.mkdir, exist_ok=True)
    folder = place / f"{UNFINISHED}{uuid.uuid4().hex}"
    await asyncio.to_thread(folder.mkdir)
    change.state = "planning"
    try:
        job = Job(
            bundle=str(vset.folder),
            name=change.name,
            spec=wanted.spec,
            folder=str(folder),
            free_bytes=await _free_bytes(vset, change.name, wanted.evict),
            bits=wanted.fit.bits,
            max_kl=wanted.fit.max_kl,
        )
        addition, files, notes = await planner.plan(job, change.set_progress)
        change.notes += [note for note in notes if note not in change.notes]
        addition = msgspec.structs.replace(addition, source=wanted.source)
        change.arrives(addition.version)
        final = vset.folder / addition.folder
        known = next((held for held in vset.held if held.version == addition.version), None)
        if known is not None:
            yield Arrival(vset, known)
            return
        change.state, change.stage = "loading", "loading"
        await asyncio.to_thread(rename_addition, folder, final)
        folder = final
        info = await _load(vset, change, addition, final, wanted.evict)
        try:
            yield Arrival(vset, info, addition, files)
        except BaseException:
            with contextlib.suppress(PolymoeError):
                await vset.client.drop_variant(info)
            raise
        folder = place / UNFINISHED  # nothing to remove
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))


async def _load(vset: VariantSet, change: Change, addition: Addition, folder: Path, evict: Evict) -> VariantInfo:
    candidates = vset.evictable(change.name, evict)
    while True:
        try:
            return await vset.client.add_variant(str(folder), addition)
        except ChangeRefusedError:
            if not candidates:
                raise
        gone = candidates.pop(0)
        change.notes.append(f"{gone.name}@{gone.version[:8]} made room")
        await vset.evict(gone)


async def _free_bytes(vset: VariantSet, name: str, evict: Evict) -> int | None:
    free = await vset.free_bytes()
    return None if free is None else free + sum(info.device_bytes for info in vset.evictable(name, evict))
