"""The variants of a running server: each change is planned beside the traffic, loaded between two steps, written to the
bundle's folder, and only then visible.

    source -> planner -> folder in the bundle, not listed -> engine -> manifest rewritten -> names point to it

A server with an engine of its own has one set of variants, a deployment one for each pool of replicas. A name may be in
several pools and means a version in each; what it means is changed in all of them in one step.
Whatever fails on the way, nothing of it stays; whoever kills the server leaves the old state or the new one.
"""

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial

from polymoe.bundle.atomic import remove_next
from polymoe.bundle.manifest import VARIANT_NAME, read_manifest
from polymoe.bundle.rewrite import remove_unlisted
from polymoe.client.client import AsyncEngineClient
from polymoe.client.interface import EngineClient
from polymoe.errors import ChangeRefusedError
from polymoe.protocol.info import VariantInfo
from polymoe.server.arrival import Wanted, arrived
from polymoe.server.planner import Planner
from polymoe.server.pool_choice import best_pool
from polymoe.server.replan import REPLAN, NextBundle, plan_and_switch, plan_job
from polymoe.server.settings import ServerSettings
from polymoe.server.variant_change import Change, Changes, Evict, Fit
from polymoe.server.variant_set import Edit, Meaning, VariantSet, commit
from polymoe.server.variant_sources import resolve_source

_LOSSLESS = Fit()


class Variants:
    """The changes of one server's versions. All methods belong to its event loop."""

    def __init__(
        self,
        client: EngineClient,
        settings: ServerSettings,
        on_switch: Callable[[AsyncEngineClient], None] = lambda _client: None,
    ) -> None:
        """`on_switch`: called with the engine that requests go to from now on."""
        self._settings, self._on_switch = settings, on_switch
        self.planner = Planner(settings.plan_threads)
        self.changes = Changes()
        self.sets = [VariantSet(part, self.changes, pool) for pool, part in client.parts.items()]
        self._ready = False

    # --- life

    async def start(self) -> None:
        """Once the engine is ready: clear away what interrupted changes left, and have a planner. Idempotent."""
        changing = [vset for vset in self.sets if vset.can_change]
        if self._ready or not changing:
            return
        self._ready = True
        for vset in changing:
            await asyncio.to_thread(remove_next, vset.folder)
            manifest = await asyncio.to_thread(read_manifest, vset.folder)
            await asyncio.to_thread(remove_unlisted, vset.folder, manifest)
            vset.take(manifest)
        await self.planner.start()

    async def close(self) -> None:
        """Give up what is going on."""
        await self.changes.close()
        await self.planner.close()

    # --- what there is

    @property
    def revision(self) -> int:
        """Grows with each change of what names mean."""
        return sum(vset.revision for vset in self.sets)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for vset in self.sets for name in vset.names))

    @property
    def draining(self) -> dict[int, VariantInfo]:
        """Place -> what goes when its last request has ended."""
        return {place: info for vset in self.sets for place, info in vset.draining.items()}

    def is_pinned(self, info: VariantInfo) -> bool:
        return any(info.place in vset.pinned for vset in self.sets)

    def names_of(self, info: VariantInfo) -> list[str]:
        """What means a version."""
        meant = (name for vset in self.sets for name, held in vset.names.items() if held.place == info.place)
        return list(dict.fromkeys(meant))

    def previous_of(self, info: VariantInfo) -> list[str]:
        """Names that meant it before."""
        meant = (name for vset in self.sets for name, held in vset.previous.items() if held.place == info.place)
        return list(dict.fromkeys(meant))

    # --- changes

    async def add(
        self, name: str, source: str, *, fit: Fit = _LOSSLESS, evict: Evict = "none", replaces: bool = False
    ) -> Change:
        """Begin to add a variant, to the pool that suits it best, or to replace one where it is. Raises
        `ChangeRefusedError` for what is wrong at once."""
        await self.start()
        sets = self._check_can_change(name, replaces)
        if VARIANT_NAME.fullmatch(name) is None:
            raise ChangeRefusedError(
                f"{name[:80]!r} is no name of a variant: 1 to 64 letters, digits, '.', '_', '-', and first a letter or "
                "digit.",
                param="name",
            )
        taken = None if replaces else next((n for n in self.names if n.casefold() == name.casefold()), None)
        if taken is not None:
            raise ChangeRefusedError(
                f"There is a variant {taken}; replace it, or choose another name.", status=409, param="name",
                code="name_exists",
            )  # fmt: skip
        base = self._having(source.split("+")[0])
        read_from = (base or sets)[0]
        manifest = await asyncio.to_thread(read_manifest, read_from.folder)
        root = self._settings.variants_root
        spec = await asyncio.to_thread(resolve_source, source, root, manifest, read_from.client.versions)
        self.changes.check_none(name)  # again: of two at a time one is first
        change = Change(name, "replace" if replaces else "add")
        wanted = Wanted(spec, source, fit, evict)
        if not replaces:
            sets = [vset for vset in base if vset.can_change] or sets
        return self.changes.begin(change, self._add(change, wanted, sets, replaces))

    async def remove(self, name: str, force: bool = False) -> Change:
        """Take a name away, and its versions that nothing else names. Requests that run end first; with `force` they
        are ended."""
        await self.start()
        sets = self._check_can_change(name, exists=True)
        change = Change(name, "remove", "draining")

        def edit(vset: VariantSet, meaning: Meaning) -> None:
            gone = vset.require(name)
            if len(meaning.names) == 1:
                of = f"pool {vset.pool}" if vset.pool else "a server"
                raise ChangeRefusedError(
                    f"{name} is the last variant; {of} has at least one.", status=409, param="name"
                )
            del meaning.names[name]
            places = {gone.place} | ({meaning.previous.pop(name).place} if name in meaning.previous else set())
            meaning.pinned -= places - {info.place for info in meaning.names.values()}

        with self.changes.reserved(change):
            await _commit(sets, edit)
        return self.changes.begin(change, self._drain(sets, force))

    async def _drain(self, sets: list[VariantSet], force: bool) -> None:
        await asyncio.gather(*(vset.drain(force) for vset in sets))

    async def point(self, name: str, to: str) -> VariantInfo:
        """Let `name`, old or new, mean what `to` (a name or name@version) means."""
        await self.start()
        self._check_can_change(name)
        if VARIANT_NAME.fullmatch(name) is None:
            raise ChangeRefusedError(f"{name[:80]!r} is no name of a variant.", param="name")
        there = self._require(to)
        sets = self._having(name) or there
        if elsewhere := [vset for vset in sets if vset not in there]:
            raise ChangeRefusedError(
                f"{name} is in pool {elsewhere[0].pool}, which does not hold {to}. Remove {name} first, or add there "
                f"what {to} means.",
                status=409, param="to",
            )  # fmt: skip

        def edit(vset: VariantSet, meaning: Meaning) -> None:
            if (target := vset.find(to)) is None:  # gone meanwhile
                self._require(to)
            else:
                meaning.point(name, target)

        await _commit(sets, edit)
        for vset in sets:
            vset.drop_unwanted()
        return sets[0].require(name)

    async def rollback(self, name: str) -> VariantInfo:
        """Let `name` mean what it meant before. Again: back."""
        await self.start()
        sets = self._check_can_change(name, exists=True)

        def edit(vset: VariantSet, meaning: Meaning) -> None:
            vset.require(name)
            if (before := meaning.previous.get(name)) is None:
                where = f" in pool {vset.pool}" if vset.pool else ""
                raise ChangeRefusedError(
                    f"No version before that of {name} is held{where}.", status=404, param="name",
                    code="version_not_found",
                )  # fmt: skip
            meaning.point(name, before)

        await _commit(sets, edit)
        return sets[0].require(name)

    async def pin(self, model: str, pinned: bool) -> VariantInfo:
        """Keep a version though no name means it, or no longer."""
        await self.start()
        sets = self._require(model)
        found = [vset.find(model) for vset in sets]
        targets = {vset.pool: info for vset, info in zip(sets, found, strict=True) if info is not None}

        def edit(vset: VariantSet, meaning: Meaning) -> None:
            (meaning.pinned.add if pinned else meaning.pinned.discard)(targets[vset.pool].place)

        await _commit(sets, edit)
        for vset in sets:
            vset.drop_unwanted()
        return targets[sets[0].pool]

    async def replan(self, policy: str | None = None, memory: str | None = None) -> Change:
        """Begin to plan what names mean as a new bundle, from the sources, and to switch to it. `policy`, `memory`: as
        of `polymoe plan`; default those of the bundle. Versions that no name means are not taken along."""
        await self.start()
        vset = self.sets[0]
        if not isinstance(vset.client, AsyncEngineClient):  # engines elsewhere, several of them
            raise ChangeRefusedError(
                "a deployment does not plan its bundle again while it serves; plan beside it (`polymoe plan`) and "
                "deploy the new bundle, which rolls without a failed request."
            )
        self._check_can_change(REPLAN)
        named = {info.place for info in vset.names.values()}
        if kept := [info for info in vset.held if info.place in vset.pinned - named]:
            raise ChangeRefusedError(
                f"{kept[0].name}@{kept[0].version[:8]} is pinned and no name means it, so it would be lost; unpin it, "
                "or give it a name.",
                status=409,
            )
        manifest = await asyncio.to_thread(read_manifest, vset.folder)
        job, aliases = plan_job(vset.names, manifest, vset.folder, policy, memory)
        pinned = [name for name in job.specs if vset.names[name].place in vset.pinned]
        change = Change(REPLAN, "replan")
        work = plan_and_switch(
            change, NextBundle(job, aliases, pinned), vset, vset.client, self._on_switch, self._settings.plan_threads
        )
        return self.changes.begin(change, work)

    # --- how a change goes on

    async def _add(self, change: Change, wanted: Wanted, sets: list[VariantSet], replaces: bool) -> None:
        if not replaces:
            sets = [await best_pool(sets, self.planner, change, wanted)]
        async with contextlib.AsyncExitStack() as stack:
            arrivals = [await stack.enter_async_context(arrived(vset, self.planner, change, wanted)) for vset in sets]
            change.state, change.stage = "writing", "writing"
            await commit([
                Edit(a.set, partial(Meaning.point, name=change.name, to=a.info), a.addition, a.files) for a in arrivals
            ])  # fmt: skip
        for vset in sets:
            vset.drop_unwanted()

    # --- checks

    def _having(self, model: str) -> list[VariantSet]:
        """The sets in which a name, or name@version, means something."""
        return [vset for vset in self.sets if vset.find(model) is not None]

    def _require(self, model: str) -> list[VariantSet]:
        """As `_having`. Raises `ChangeRefusedError` for none."""
        if not (sets := self._having(model)):
            held = sorted({f"{info.name}@{info.version[:8]}" for vset in self.sets for info in vset.held})
            raise ChangeRefusedError(
                f"There is no version {model[:100]}; held are {', '.join(held)}.", status=404, param="name",
                code="version_not_found",
            )  # fmt: skip
        return sets

    def _check_can_change(self, name: str, exists: bool = False) -> list[VariantSet]:
        """The sets that have the name, if it has to exist, else those that can change. Raises `ChangeRefusedError`."""
        if not (sets := [vset for vset in self.sets if vset.can_change]):
            raise ChangeRefusedError("variants can only come and go where the server was started with --max-variants.")
        self.changes.check_none(name)
        having = [vset for vset in self.sets if name in vset.names]
        if not exists:
            return sets
        if not having:
            raise ChangeRefusedError(
                f"There is no variant {name[:80]}; there are {', '.join(self.names)}.", status=404, param="name",
                code="model_not_found",
            )  # fmt: skip
        _check_live(having)
        return having


def _check_live(sets: list[VariantSet]) -> None:
    if fixed := [vset.pool for vset in sets if not vset.can_change]:
        raise ChangeRefusedError(f"the variants of pool {fixed[0]} are fixed; deploy it with `max_variants`.")


async def _commit(sets: list[VariantSet], edit: Callable[[VariantSet, Meaning], None]) -> None:
    _check_live(sets)
    await commit([Edit(vset, partial(edit, vset)) for vset in sets])
