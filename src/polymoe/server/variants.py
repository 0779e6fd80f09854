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
from polymoe.bundle.live import ADDITIONS, UNFINISHED, Addition
from polymoe.bundle.manifest import VARIANT_NAME, read_manifest
from polymoe.bundle.rewrite import remove_unlisted
from polymoe.client.client import AsyncEngineClient
from polymoe.errors import ChangeRefusedError, PolymoeError
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.planning import Job
from polymoe.server.planner import Planner
from polymoe.server.replan import REPLAN, NextBundle, exchange_folders, plan_job, prepared, retire
from polymoe.server.settings import ServerSettings
from polymoe.server.variant_change import Change, Changes, Evict, Fit, rename_addition
from polymoe.server.variant_set import Meaning, VariantSet
from polymoe.server.variant_sources import resolve_source

_LOSSLESS = Fit()


class Variants:
    """The changes of one server's `held` versions. All methods belong to its event loop."""

    def __init__(
        self,
        client: AsyncEngineClient,
        settings: ServerSettings,
        on_switch: Callable[[AsyncEngineClient], None] = lambda _client: None,
    ) -> None:
        """`on_switch`: called with the engine that requests go to from now on."""
        self._settings, self._on_switch = settings, on_switch
        self.planner = Planner(settings.plan_threads)
        self.changes = Changes()
        self.set = VariantSet(client, self.changes)
        self._ready = False

    # --- life

    async def start(self) -> None:
        """Once the engine is ready: clear away what interrupted changes left, and have a planner. Idempotent."""
        if self._ready or not self.set.client.info.max_variants:
            return
        self._ready = True
        folder = self.set.folder
        await asyncio.to_thread(remove_next, folder)
        manifest = await asyncio.to_thread(read_manifest, folder)
        await asyncio.to_thread(remove_unlisted, folder, manifest)
        self.set.take(manifest)
        await self.planner.start()

    async def close(self) -> None:
        """Give up what is going on."""
        await self.changes.close()
        await self.planner.close()

    # --- changes

    async def add(
        self, name: str, source: str, *, fit: Fit = _LOSSLESS, evict: Evict = "none", replaces: bool = False
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
            self.set.require(name)
        elif (taken := next((n for n in self.set.names if n.casefold() == name.casefold()), None)) is not None:
            raise ChangeRefusedError(
                f"There is a variant {taken}; replace it, or choose another name.", status=409, param="name",
                code="name_exists",
            )  # fmt: skip
        manifest = await asyncio.to_thread(read_manifest, self.set.folder)
        versions = self.set.client.processor.versions
        spec = await asyncio.to_thread(resolve_source, source, self._settings.variants_root, manifest, versions)
        self.changes.check_none(name)  # again: of two at a time one is first
        change = Change(name, "replace" if replaces else "add")
        return self.changes.begin(change, self._add(change, spec, source, fit, evict))

    async def remove(self, name: str, force: bool = False) -> Change:
        """Take a name away, and its versions that nothing else names. Requests that run end first; with `force` they
        are ended."""
        await self.start()
        self._check_can_change(name)
        change = Change(name, "remove", "draining")

        def edit(meaning: Meaning) -> None:
            gone = self.set.require(name)
            if len(meaning.names) == 1:
                raise ChangeRefusedError(
                    f"{name} is the last variant; a server has at least one.", status=409, param="name"
                )
            del meaning.names[name]
            places = {gone.place} | ({meaning.previous.pop(name).place} if name in meaning.previous else set())
            meaning.pinned -= places - {info.place for info in meaning.names.values()}

        with self.changes.reserved(change):
            await self.set.commit(edit)
        return self.changes.begin(change, self.set.drain(force))

    async def point(self, name: str, to: str) -> VariantInfo:
        """Let `name`, old or new, mean what `to` (a name or name@version) means."""
        await self.start()
        self._check_can_change(name)
        if VARIANT_NAME.fullmatch(name) is None:
            raise ChangeRefusedError(f"{name[:80]!r} is no name of a variant.", param="name")
        await self.set.commit(lambda meaning: meaning.point(name, self.set.find(to)))
        self.set.drop_unwanted()
        return self.set.require(name)

    async def rollback(self, name: str) -> VariantInfo:
        """Let `name` mean what it meant before. Again: back."""
        await self.start()
        self._check_can_change(name)

        def edit(meaning: Meaning) -> None:
            self.set.require(name)
            if (before := meaning.previous.get(name)) is None:
                raise ChangeRefusedError(
                    f"No version before that of {name} is held.", status=404, param="name", code="version_not_found"
                )
            meaning.point(name, before)

        await self.set.commit(edit)
        return self.set.require(name)

    async def pin(self, model: str, pinned: bool) -> VariantInfo:
        """Keep a version though no name means it, or no longer."""
        await self.start()

        def edit(meaning: Meaning) -> None:
            (meaning.pinned.add if pinned else meaning.pinned.discard)(self.set.find(model).place)

        target = self.set.find(model)
        await self.set.commit(edit)
        self.set.drop_unwanted()
        return target

    async def replan(self, policy: str | None = None, memory: str | None = None) -> Change:
        """Begin to plan what names mean as a new bundle, from the sources, and to switch to it. `policy`, `memory`: as
        of `polymoe plan`; default those of the bundle. Versions that no name means are not taken along."""
        await self.start()
        if not isinstance(self.set.client, AsyncEngineClient):  # engines elsewhere, several of them
            raise ChangeRefusedError(
                "a deployment does not plan its bundle again while it serves; plan beside it (`polymoe plan`) and "
                "deploy the new bundle, which rolls without a failed request."
            )
        self._check_can_change(REPLAN)
        named = {info.place for info in self.set.names.values()}
        if kept := [info for info in self.set.held if info.place in self.set.pinned - named]:
            raise ChangeRefusedError(
                f"{kept[0].name}@{kept[0].version[:8]} is pinned and no name means it, so it would be lost; unpin it, "
                "or give it a name.",
                status=409,
            )
        manifest = await asyncio.to_thread(read_manifest, self.set.folder)
        job, aliases = plan_job(self.set.names, manifest, self.set.folder, policy, memory)
        pinned = [name for name in job.specs if self.set.names[name].place in self.set.pinned]
        change = Change(REPLAN, "replan")
        return self.changes.begin(change, self._replan(change, NextBundle(job, aliases, pinned)))

    # --- how a change goes on

    async def _replan(self, change: Change, wanted: NextBundle) -> None:
        folder, meant = self.set.folder, self.set.meant
        arrived: AsyncEngineClient | None = None
        before: AsyncEngineClient | None = None
        try:
            arrived = await prepared(wanted, change, self.set.client, self._settings.plan_threads)
            manifest = await asyncio.to_thread(read_manifest, Path(wanted.job.out))
            async with self.set.writing:
                if self.changes.open_beside(change) or meant != self.set.meant:
                    raise ChangeRefusedError(
                        "variants were changed while the bundle was planned again; start it again when no change is "
                        "going on.",
                        status=409, code="change_in_progress",
                    )  # fmt: skip
                change.state = change.stage = "writing"
                exchange_folders(wanted.job, folder)
                arrived.config = self.set.client.config
                before, self.set.client = self.set.client, arrived
                self._on_switch(self.set.client)
                self.set.take(manifest)
        finally:
            if before is None:
                if arrived is not None:
                    await asyncio.shield(arrived.shutdown(0.0))
                await asyncio.shield(asyncio.to_thread(remove_next, folder))
        assert before is not None
        change.state = change.stage = "draining"
        await retire(before, folder)

    async def _add(self, change: Change, spec: str, source: str, fit: Fit, evict: Evict) -> None:
        place = self.set.folder / ADDITIONS
        await asyncio.to_thread(place.mkdir, exist_ok=True)
        folder = place / f"{UNFINISHED}{uuid.uuid4().hex}"
        await asyncio.to_thread(folder.mkdir)
        try:
            free = await self._free_bytes(change.name, evict)
            job = Job(
                bundle=str(self.set.folder),
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
            final = self.set.folder / addition.folder
            known = next((held for held in self.set.held if held.version == addition.version), None)
            if known is None:
                change.state, change.stage = "loading", "loading"
                await asyncio.to_thread(rename_addition, folder, final)
                folder = final
                arrived = await self._load(change, addition, final, evict)
                change.state, change.stage = "writing", "writing"
                try:
                    await self.set.commit(lambda meaning: meaning.point(change.name, arrived), addition, files)
                except BaseException:
                    with contextlib.suppress(PolymoeError):
                        await self.set.client.drop_variant(arrived)
                    raise
                folder = place / UNFINISHED  # nothing to remove
            else:
                await self.set.commit(lambda meaning: meaning.point(change.name, known))
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))
        self.set.drop_unwanted()

    async def _load(self, change: Change, addition: Addition, folder: Path, evict: Evict) -> VariantInfo:
        candidates = self.set.evictable(change.name, evict)
        while True:
            try:
                return await self.set.client.add_variant(str(folder), addition)
            except ChangeRefusedError:
                if not candidates:
                    raise
            gone = candidates.pop(0)
            change.notes.append(f"{gone.name}@{gone.version[:8]} made room")
            await self.set.evict(gone)

    async def _free_bytes(self, name: str, evict: Evict) -> int | None:
        headroom = self.set.client.info.headroom
        if headroom is None:
            return None
        stats = await self.set.client.stats()
        return headroom - stats.added_bytes + sum(info.device_bytes for info in self.set.evictable(name, evict))

    # --- checks

    def _check_can_change(self, name: str) -> None:
        if not self.set.client.info.max_variants:
            raise ChangeRefusedError("variants can only come and go where the server was started with --max-variants.")
        self.changes.check_none(name)
