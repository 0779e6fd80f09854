"""Which versions a server holds and what names mean: in the engine, in the bundle's folder and for clients alike."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymoe.bundle.live import Addition, LiveState, added_folder
from polymoe.bundle.manifest import FileRecord, Manifest
from polymoe.bundle.rewrite import rewrite_manifest
from polymoe.client.client import AsyncEngineClient
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
    """All methods belong to the server's event loop. `client`: the engine of now; `changes`: those that go on."""

    def __init__(self, client: AsyncEngineClient, changes: Changes) -> None:
        self.client, self.changes = client, changes
        self.writing = asyncio.Lock()  # held while the folder changes
        self.revision = 0  # grows with each change of what names mean
        self.previous: dict[str, VariantInfo] = {}
        self.pinned: set[int] = set()
        self.draining: dict[int, VariantInfo] = {}  # place -> what goes when its last request has ended
        self.num_planned = 0  # places below are those of variants that were planned with the bundle

    @property
    def folder(self) -> Path:
        return Path(self.client.config.bundle).expanduser().resolve()

    @property
    def names(self) -> dict[str, VariantInfo]:
        """What each name means now, as it is held."""
        versions = self.client.processor.versions
        return {name: versions.held[place] for name, place in versions.names.items()}

    @property
    def meant(self) -> dict[str, str]:
        """Name -> version."""
        return {name: info.version for name, info in self.names.items()}

    @property
    def held(self) -> list[VariantInfo]:
        return list(self.client.processor.versions.held.values())

    def take(self, manifest: Manifest) -> None:
        """Begin with what the manifest of the served bundle says."""
        live = manifest.live_state
        by_version = {info.version: info for info in self.held}
        self.num_planned = len(manifest.variants)
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

    def find(self, model: str) -> VariantInfo:
        """A name's or NAME@VERSION's. Raises `ChangeRefusedError`."""
        found = self.client.processor.versions.find(model)
        if found is None or found.place in self.draining:
            held = ", ".join(sorted(f"{i.name}@{i.version[:8]}" for i in self.held))
            raise ChangeRefusedError(
                f"There is no version {model[:100]}; held are {held}.", status=404, param="name",
                code="version_not_found",
            )  # fmt: skip
        return self.client.processor.versions.held[found.place]

    async def commit(
        self,
        edit: Callable[[Meaning], None],
        addition: Addition | None = None,
        files: Sequence[FileRecord] = (),
    ) -> None:
        """Write what `edit` makes of the state to the bundle, then let it hold. Raises `ChangeRefusedError` where it
        cannot be written, and what `edit` raises; all is as before then."""
        async with self.writing:
            meaning = Meaning(self.names, dict(self.previous), set(self.pinned))
            edit(meaning)
            held = {info.place: info for info in self.held}
            meaning.previous = {
                n: info for n, info in meaning.previous.items() if n in meaning.names and info.place in held
            }
            meaning.pinned &= held.keys()
            state = LiveState(
                names={name: info.version for name, info in meaning.names.items()},
                previous={name: info.version for name, info in meaning.previous.items()},
                pinned=sorted(held[place].version for place in meaning.pinned),
            )
            try:
                await asyncio.to_thread(
                    rewrite_manifest, self.folder, lambda manifest: with_state(manifest, state, addition, list(files))
                )
            except OSError as error:
                raise ChangeRefusedError(
                    f"the bundle cannot be written ({error.strerror or error}); all is as before. Free some space, or "
                    "make it writable.",
                    status=507 if error.errno == 28 else 422,
                ) from error
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
            added = [info for info in self.held if info.place >= self.num_planned and info.place not in kept]
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
        if info.place >= self.num_planned:
            await asyncio.to_thread(shutil.rmtree, folder, True)
