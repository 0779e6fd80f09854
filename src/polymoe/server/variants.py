"""The set of variants of a running server: each change is planned beside the traffic, loaded between two steps,
written to the bundle's folder, and only then visible.

    source -> planner -> folder in the bundle, not listed -> engine -> manifest rewritten -> names point to it

Whatever fails on the way, nothing of it stays; whoever kills the server leaves the old state or the new one.
"""

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from polymoe.bundle.atomic import remove_next
from polymoe.bundle.live import ADDITIONS, UNFINISHED, Addition, LiveState, added_folder
from polymoe.bundle.manifest import VARIANT_NAME, FileRecord, Manifest, read_manifest
from polymoe.bundle.rewrite import remove_unlisted, rewrite_manifest
from polymoe.client.client import AsyncEngineClient
from polymoe.errors import ChangeRefusedError, EngineDeadError, PolymoeError
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.planning import Job
from polymoe.server.planner import Planner
from polymoe.server.replan import REPLAN, NextBundle, exchange_folders, plan_job, prepared, retire
from polymoe.server.settings import ServerSettings
from polymoe.server.variant_change import Change, Changes, Fit, rename_addition, with_state
from polymoe.server.variant_sources import resolve_source

_LOSSLESS = Fit()


class Variants:
    """Names, versions and changes of one server. All methods belong to its event loop."""

    def __init__(
        self,
        client: AsyncEngineClient,
        settings: ServerSettings,
        on_switch: Callable[[AsyncEngineClient], None] = lambda _client: None,
    ) -> None:
        """`on_switch`: called with the engine that requests go to from now on."""
        self._client, self._settings, self._on_switch = client, settings, on_switch
        self.planner = Planner(settings.plan_threads)
        self.changes = Changes()
        self._writing = asyncio.Lock()
        self.revision = 0  # grows with each change of what names mean
        self.previous: dict[str, VariantInfo] = {}
        self.pinned: set[int] = set()  # places
        self.draining: dict[int, VariantInfo] = {}
        self._ready = False
        self._num_planned = 0  # places below are those of variants that were planned with the bundle

    # --- life

    async def start(self) -> None:
        """Once the engine is ready: clear away what interrupted changes left, and have a planner. Idempotent."""
        if self._ready or not self._client.info.max_variants:
            return
        self._ready = True
        await asyncio.to_thread(remove_next, self.folder)
        manifest = await asyncio.to_thread(read_manifest, self.folder)
        await asyncio.to_thread(remove_unlisted, self.folder, manifest)
        self._take_state(manifest)
        await self.planner.start()

    def _take_state(self, manifest: Manifest) -> None:
        self._num_planned = len(manifest.variants)
        live = manifest.live_state
        by_version = {info.version: info for info in self._held()}
        self.previous = {n: by_version[v] for n, v in live.previous.items() if v in by_version}
        self.pinned = {by_version[v].place for v in live.pinned if v in by_version}

    async def close(self) -> None:
        """Give up what is going on."""
        await self.changes.close()
        await self.planner.close()

    @property
    def folder(self) -> Path:
        return Path(self._client.config.bundle).expanduser().resolve()

    @property
    def names(self) -> dict[str, VariantInfo]:
        """What each name means now, as it is held."""
        versions = self._client.processor.versions
        return {name: versions.held[place] for name, place in versions.names.items()}

    def _meant(self) -> dict[str, str]:
        """Name -> version."""
        return {name: info.version for name, info in self.names.items()}

    def _held(self) -> list[VariantInfo]:
        return list(self._client.processor.versions.held.values())

    # --- changes

    async def add(
        self, name: str, source: str, *, fit: Fit = _LOSSLESS, evict: bool = False, replaces: bool = False
    ) -> Change:
        """Begin to add a variant, or to replace one. Raises `ChangeRefusedError` for what is wrong at once."""
        await self.start()
        self._check_can_change(name)
        if VARIANT_NAME.fullmatch(name) is None:
            raise ChangeRefusedError(
                f"{name[:80]!r} is no name of a variant: 1 to 64 letters, digits, '.', '_', '-', and first a letter or "
                "digit.",
                param="name",
            )
        if replaces:
            self._require(name)
        elif (taken := next((n for n in self.names if n.casefold() == name.casefold()), None)) is not None:
            raise ChangeRefusedError(
                f"There is a variant {taken}; replace it, or choose another name.", status=409, param="name",
                code="name_exists",
            )  # fmt: skip
        manifest = await asyncio.to_thread(read_manifest, self.folder)
        versions = self._client.processor.versions
        spec = await asyncio.to_thread(resolve_source, source, self._settings.variants_root, manifest, versions)
        change = Change(name, "replace" if replaces else "add")
        return self.changes.begin(change, self._add(change, spec, source, fit, evict))

    async def remove(self, name: str, force: bool = False) -> Change:
        """Take a name away, and its versions that nothing else names. Requests that run end first; with `force` they
        are ended."""
        await self.start()
        self._check_can_change(name)
        self._require(name)
        if len(self.names) == 1:
            raise ChangeRefusedError(
                f"{name} is the last variant; a server has at least one.", status=409, param="name"
            )
        change = Change(name, "remove", "draining")
        names = {n: info for n, info in self.names.items() if n != name}
        previous = {n: info for n, info in self.previous.items() if n != name}
        gone = self.names[name]
        pinned = self.pinned - {i.place for i in (gone, self.previous.get(name)) if i and i not in names.values()}
        await self._commit(names, previous, pinned)
        return self.changes.begin(change, self._drain(force))

    async def point(self, name: str, to: str) -> VariantInfo:
        """Let `name`, old or new, mean what `to` (a name or name@version) means."""
        await self.start()
        self._check_can_change(name)
        if VARIANT_NAME.fullmatch(name) is None:
            raise ChangeRefusedError(f"{name[:80]!r} is no name of a variant.", param="name")
        target = self._find(to)
        previous = dict(self.previous)
        if name in self.names and self.names[name] is not target:
            previous[name] = self.names[name]
        await self._commit({**self.names, name: target}, previous, self.pinned)
        self._drop_unwanted()
        return target

    async def rollback(self, name: str) -> VariantInfo:
        """Let `name` mean what it meant before. Again: back."""
        await self.start()
        self._check_can_change(name)
        current = self._require(name)
        before = self.previous.get(name)
        if before is None:
            raise ChangeRefusedError(
                f"No version before that of {name} is held.", status=404, param="name", code="version_not_found"
            )
        await self._commit({**self.names, name: before}, {**self.previous, name: current}, self.pinned)
        return before

    async def pin(self, model: str, pinned: bool) -> VariantInfo:
        """Keep a version though no name means it, or no longer."""
        await self.start()
        target = self._find(model)
        places = self.pinned | {target.place} if pinned else self.pinned - {target.place}
        await self._commit(self.names, self.previous, places)
        self._drop_unwanted()
        return target

    async def replan(self, policy: str | None = None, memory: str | None = None) -> Change:
        """Begin to plan what names mean as a new bundle, from the sources, and to switch to it. `policy`, `memory`: as
        of `polymoe plan`; default those of the bundle. Versions that no name means are not taken along."""
        await self.start()
        self._check_can_change(REPLAN)
        named = {info.place for info in self.names.values()}
        if kept := [info for info in self._held() if info.place in self.pinned - named]:
            raise ChangeRefusedError(
                f"{kept[0].name}@{kept[0].version[:8]} is pinned and no name means it, so it would be lost; unpin it, "
                "or give it a name.",
                status=409,
            )
        manifest = await asyncio.to_thread(read_manifest, self.folder)
        job, aliases = plan_job(self.names, manifest, self.folder, policy, memory)
        pinned = [name for name in job.specs if self.names[name].place in self.pinned]
        change = Change(REPLAN, "replan")
        return self.changes.begin(change, self._replan(change, NextBundle(job, aliases, pinned)))

    # --- how a change goes on

    async def _replan(self, change: Change, wanted: NextBundle) -> None:
        folder, meant = self.folder, self._meant()
        arrived: AsyncEngineClient | None = None
        before: AsyncEngineClient | None = None
        try:
            arrived = await prepared(wanted, change, self._client, self._settings.plan_threads)
            manifest = await asyncio.to_thread(read_manifest, Path(wanted.job.out))
            async with self._writing:
                if self.changes.open_beside(change) or meant != self._meant():
                    raise ChangeRefusedError(
                        "variants were changed while the bundle was planned again; start it again when no change is "
                        "going on.",
                        status=409, code="change_in_progress",
                    )  # fmt: skip
                change.state = change.stage = "writing"
                exchange_folders(wanted.job, folder)
                arrived.config = self._client.config
                before, self._client = self._client, arrived
                self._on_switch(self._client)
                self.revision += 1
                self.draining = {}
                self._take_state(manifest)
        finally:
            if before is None:
                if arrived is not None:
                    await asyncio.shield(arrived.shutdown(0.0))
                await asyncio.shield(asyncio.to_thread(remove_next, folder))
        change.state = change.stage = "draining"
        await retire(before, folder)

    async def _add(self, change: Change, spec: str, source: str, fit: Fit, evict: bool) -> None:
        place = self.folder / ADDITIONS
        await asyncio.to_thread(place.mkdir, exist_ok=True)
        folder = place / f"{UNFINISHED}{uuid.uuid4().hex}"
        await asyncio.to_thread(folder.mkdir)
        try:
            free = await self._free_bytes(evict)
            job = Job(
                bundle=str(self.folder),
                name=change.name,
                spec=spec,
                folder=str(folder),
                free_bytes=free,
                bits=fit.bits,
                max_kl=fit.max_kl,
            )
            addition, files, change.notes = await self.planner.plan(job, change.set_progress)
            addition = msgspec.structs.replace(addition, source=source)
            change.version = addition.version
            final = self.folder / addition.folder
            info = next((held for held in self._held() if held.version == addition.version), None)
            if info is None:
                change.state, change.stage = "loading", "loading"
                await asyncio.to_thread(rename_addition, folder, final)
                folder = final
                info = await self._load(addition, final, evict)
                change.state, change.stage = "writing", "writing"
                try:
                    await self._point_to(change.name, info, addition, files)
                except BaseException:
                    with contextlib.suppress(PolymoeError):
                        await self._client.drop_variant(info)
                    raise
                folder = place / UNFINISHED  # nothing to remove
            else:
                await self._point_to(change.name, info)
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))
        self._drop_unwanted()

    async def _point_to(
        self, name: str, info: VariantInfo, addition: Addition | None = None, files: list[FileRecord] | None = None
    ) -> None:
        previous = dict(self.previous)
        if name in self.names and self.names[name] is not info:
            previous[name] = self.names[name]
        await self._commit({**self.names, name: info}, previous, self.pinned, addition, files or [])

    async def _load(self, addition: Addition, folder: Path, evict: bool) -> VariantInfo:
        try:
            return await self._client.add_variant(str(folder), addition)
        except ChangeRefusedError:
            if not evict or not self._evictable():
                raise
        await self._evict()
        return await self._client.add_variant(str(folder), addition)

    async def _free_bytes(self, evict: bool) -> int | None:
        headroom = self._client.info.headroom
        if headroom is None:
            return None
        stats = await self._client.stats()
        return headroom - stats.added_bytes + (sum(i.device_bytes for i in self._evictable()) if evict else 0)

    def _evictable(self) -> list[VariantInfo]:
        """Versions that are held for `rollback` alone."""
        named = {info.place for info in self.names.values()} | self.pinned
        return [info for info in self.previous.values() if info.place not in named]

    async def _evict(self) -> None:
        evicted = {info.place for info in self._evictable()}
        await self._commit(
            self.names, {n: info for n, info in self.previous.items() if info.place not in evicted}, self.pinned
        )
        await asyncio.gather(*self._drop_unwanted())

    async def _drain(self, force: bool) -> None:
        drops = self._drop_unwanted()
        if force:
            for info in list(self.draining.values()):
                self._client.abort(self._client.requests_of(info))
        await asyncio.gather(*drops)

    def _drop_unwanted(self) -> "list[asyncio.Task[None]]":
        """Free the versions that nobody can ask for any more, each when its last request has ended."""
        wanted = {info.place for info in (*self.names.values(), *self.previous.values())} | self.pinned
        unwanted = [info for info in self._held() if info.place not in wanted and info.place not in self.draining]
        if self.changes.are_going_on:  # a version that is being added is wanted soon
            unwanted = [info for info in unwanted if not self.changes.is_arriving(info.version)]
        self.draining |= {info.place: info for info in unwanted}
        loop = asyncio.get_running_loop()
        return [loop.create_task(self._drop(info)) for info in unwanted]

    async def _drop(self, info: VariantInfo) -> None:
        try:
            with contextlib.suppress(EngineDeadError):
                await self._client.drop_variant(info)
        finally:
            self.draining.pop(info.place, None)
        if info.place >= self._num_planned:
            await asyncio.to_thread(shutil.rmtree, self.folder / added_folder(info.version), True)

    async def _commit(
        self,
        names: dict[str, VariantInfo],
        previous: dict[str, VariantInfo],
        pinned: set[int],
        addition: Addition | None = None,
        files: list[FileRecord] | None = None,
    ) -> None:
        """Write the new state to the bundle, then let it hold. Raises `ChangeRefusedError` where it cannot be written;
        all is as before then."""
        held = {info.place: info for info in self._held()}
        previous = {n: info for n, info in previous.items() if n in names and info.place in held}
        pinned = pinned & held.keys()
        state = LiveState(
            names={name: info.version for name, info in names.items()},
            previous={name: info.version for name, info in previous.items()},
            pinned=sorted(held[place].version for place in pinned),
        )
        async with self._writing:
            try:
                await asyncio.to_thread(
                    rewrite_manifest, self.folder, lambda manifest: with_state(manifest, state, addition, files or [])
                )
            except OSError as error:
                raise ChangeRefusedError(
                    f"the bundle cannot be written ({error.strerror or error}); all is as before. Free some space, or "
                    "make it writable.",
                    status=507 if error.errno == 28 else 422,
                ) from error
        self._client.point(names)
        self.revision += 1
        self.previous, self.pinned = previous, pinned

    # --- checks

    def _check_can_change(self, name: str) -> None:
        if not self._client.info.max_variants:
            raise ChangeRefusedError("variants can only come and go where the server was started with --max-variants.")
        self.changes.check_none(name)

    def _require(self, name: str) -> VariantInfo:
        if name not in self.names:
            raise ChangeRefusedError(
                f"There is no variant {name[:80]}; there are {', '.join(self.names)}.", status=404, param="name",
                code="model_not_found",
            )  # fmt: skip
        return self.names[name]

    def _find(self, model: str) -> VariantInfo:
        found = self._client.processor.versions.find(model)
        if found is None or found.place in self.draining:
            held = ", ".join(sorted(f"{i.name}@{i.version[:8]}" for i in self._held()))
            raise ChangeRefusedError(
                f"There is no version {model[:100]}; held are {held}.", status=404, param="name",
                code="version_not_found",
            )  # fmt: skip
        return self._client.processor.versions.held[found.place]
