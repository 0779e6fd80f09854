"""Which versions a server holds and what names mean: in the engine, in the bundle's folder and for clients alike."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymoe.bundle.live import Addition, LiveState, added_folder
from polymoe.bundle.manifest import FileRecord, Manifest
from polymoe.bundle.rewrite import rewrite_manifests
from polymoe.client.interface import LiveClient
from polymoe.errors import ChangeRefusedError, EngineDeadError
from polymoe.protocol.info import VariantInfo
from polymoe.server.variant_change import Changes, Evict, with_state


@dataclass(eq=False)
class Meaning:
    """What names mean; what they meant before; places that stay whatever names mean."""

    names: dict[str, VariantInfo]
    previous: dict[str, VariantInfo]
    pinned: set[int]

    def point(self, name: str, to: VariantInfo) -> None:
        """`name`, old or new, means `to`."""
        if name in self.names and self.names[name].place != to.place:
            self.previous[name] = self.names[name]
        self.names[name] = to


class VariantSet:
    """All methods belong to the server's event loop. `client`: the engine of now, or the replicas of a pool; `changes`:
    those that go on; `pool`: its name, "" where there is one engine."""

    def __init__(self, client: LiveClient, changes: Changes, pool: str = "") -> None:
        self.client, self.changes, self.pool = client, changes, pool
        self.writing = asyncio.Lock()  # held while the folder changes
        self.revision = 0  # grows with each change of what names mean
        self.previous: dict[str, VariantInfo] = {}
        self.pinned: set[int] = set()
        self.draining: dict[int, VariantInfo] = {}  # place -> what goes when its last request has ended
        self.planned: frozenset[str] = frozenset()  # versions that were planned with the bundle

    @property
    def folder(self) -> Path:
        return Path(self.client.config.bundle).expanduser().resolve()

    @property
    def names(self) -> dict[str, VariantInfo]:
        """What each name means now, as it is held."""
        versions = self.client.versions
        return {name: versions.held[place] for name, place in versions.names.items()}

    @property
    def meant(self) -> dict[str, str]:
        """Name -> version."""
        return {name: info.version for name, info in self.names.items()}

    @property
    def held(self) -> list[VariantInfo]:
        return list(self.client.versions.held.values())

    @property
    def can_change(self) -> bool:
        return self.client.info.max_variants > 0

    async def free_bytes(self) -> int | None:
        """For what is added; None: what the machine has."""
        headroom = self.client.info.headroom
        return None if headroom is None else headroom - (await self.client.stats()).added_bytes

    def take(self, manifest: Manifest) -> None:
        """Begin with what the manifest of the served bundle says."""
        live = manifest.live_state
        by_version = {info.version: info for info in self.held}
        self.planned = frozenset(variant.version for variant in manifest.variants)
        self.previous = {n: by_version[v] for n, v in live.previous.items() if v in by_version}
        self.pinned = {by_version[v].place for v in live.pinned if v in by_version}
        self.draining = {}
        self.revision += 1

    def require(self, name: str) -> VariantInfo:
        """What a name means. Raises `ChangeRefusedError`."""
        if name not in self.names:
            raise ChangeRefusedError(
                f"There is no variant {name[:80]}; there are {', '.join(self.names)}.", status=404, param="name",
                code="model_not_found",
            )  # fmt: skip
        return self.names[name]

    def find(self, model: str) -> VariantInfo | None:
        """A name's or NAME@VERSION's."""
        found = self.client.versions.find(model)
        return None if found is None or found.place in self.draining else self.client.versions.held[found.place]

    async def commit(self, edit: Callable[[Meaning], None]) -> None:
        """`commit` of this set alone."""
        await commit([Edit(self, edit)])

    def edited(self, edit: Callable[[Meaning], None]) -> Meaning:
        """Raises what `edit` raises."""
        meaning = Meaning(self.names, dict(self.previous), set(self.pinned))
        edit(meaning)
        held = {info.place for info in self.held}
        meaning.previous = {
            n: info for n, info in meaning.previous.items() if n in meaning.names and info.place in held
        }
        meaning.pinned &= held
        return meaning

    def state(self, meaning: Meaning) -> LiveState:
        """As the manifest says it."""
        held = {info.place: info for info in self.held}
        return LiveState(
            names={name: info.version for name, info in meaning.names.items()},
            previous={name: info.version for name, info in meaning.previous.items()},
            pinned=sorted(held[place].version for place in meaning.pinned),
        )

    def let_hold(self, meaning: Meaning) -> None:
        """From now on, for all requests."""
        self.client.point(meaning.names)
        self.revision += 1
        self.previous, self.pinned = meaning.previous, meaning.pinned

    # --- what goes

    def evictable(self, name: str, evict: Evict) -> list[VariantInfo]:
        """What may go for a version of `name`, in this order: "previous": versions that are held for `rollback` alone;
        "unused": then those that were added and are not pinned, first who was asked longest ago."""
        if evict == "none":
            return []
        named = {info.place for info in self.names.values()} | self.pinned
        found = {info.place: info for info in self.previous.values() if info.place not in named}
        if evict == "unused":
            kept = self.pinned | self.draining.keys() | found.keys()
            if name in self.names:
                kept |= {self.names[name].place}
            added = [info for info in self.held if info.version not in self.planned and info.place not in kept]
            found |= {info.place: info for info in sorted(added, key=self.client.last_used)}
        return list(found.values())

    async def evict(self, gone: VariantInfo) -> None:
        """With its names, and at once but for its requests."""

        def edit(meaning: Meaning) -> None:
            rest = {name: info for name, info in meaning.names.items() if info.place != gone.place}
            meaning.names = rest or meaning.names  # one name stays in any case
            meaning.previous = {name: info for name, info in meaning.previous.items() if info.place != gone.place}

        await self.commit(edit)
        await asyncio.gather(*self.drop_unwanted())

    async def drain(self, force: bool) -> None:
        """Until nothing is left of what nobody can ask for any more; with `force` its requests are ended."""
        drops = self.drop_unwanted()
        if force:
            for info in list(self.draining.values()):
                self.client.abort(self.client.requests_of(info))
        await asyncio.gather(*drops)

    def drop_unwanted(self) -> "list[asyncio.Task[None]]":
        """Free the versions that nobody can ask for any more, each when its last request has ended."""
        wanted = {info.place for info in (*self.names.values(), *self.previous.values())} | self.pinned
        unwanted = [info for info in self.held if info.place not in wanted and info.place not in self.draining]
        if self.changes.are_going_on:  # a version that is being added is wanted soon
            unwanted = [info for info in unwanted if not self.changes.is_arriving(info.version)]
        self.draining |= {info.place: info for info in unwanted}
        loop = asyncio.get_running_loop()
        return [loop.create_task(self._drop(info)) for info in unwanted]

    async def _drop(self, info: VariantInfo) -> None:
        draining, folder = self.draining, self.folder / added_folder(info.version)
        try:
            with contextlib.suppress(EngineDeadError):
                await self.client.drop_variant(info)
        finally:
            draining.pop(info.place, None)
        if info.version not in self.planned:
            await asyncio.to_thread(shutil.rmtree, folder, True)


@dataclass(frozen=True)
class Edit:
    """What is to become of one set's state; addition, files: what a name then means for the first time."""

    set: VariantSet
    edit: Callable[[Meaning], None]
    addition: Addition | None = None
    files: Sequence[FileRecord] = ()


async def commit(edits: Sequence[Edit]) -> None:
    """Write what the edits make of the sets to their bundles, then let it hold, in one step for all of them.

    edits: of each set one, in the order in which the server has the sets. Raises `ChangeRefusedError` where it cannot
    be written, and what an `edit` raises; all is as before then.
    """
    async with contextlib.AsyncExitStack() as stack:
        for each in edits:
            await stack.enter_async_context(each.set.writing)
        meanings = [each.set.edited(each.edit) for each in edits]
        changes = [(each.set.folder, _change(each, meaning)) for each, meaning in zip(edits, meanings, strict=True)]
        try:
            await asyncio.to_thread(rewrite_manifests, changes)
        except OSError as error:
            raise ChangeRefusedError(
                f"the bundle cannot be written ({error.strerror or error}); all is as before. Free some space, or "
                "make it writable.",
                status=507 if error.errno == 28 else 422,
            ) from error
        for each, meaning in zip(edits, meanings, strict=True):
            each.set.let_hold(meaning)


def _change(edit: Edit, meaning: Meaning) -> Callable[[Manifest], Manifest]:
    state, files = edit.set.state(meaning), list(edit.files)
    return lambda manifest: with_state(manifest, state, edit.addition, files)
