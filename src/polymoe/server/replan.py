"""A new plan for the variants that are served, made beside them, and switched to without a dropped request.

    sources -> planner -> .NAME.next beside the bundle -> a second engine -> the two folders exchanged -> new requests
    go to the second engine, and the first one ends with its last request

Until the folders are exchanged, in one step, nothing has changed: whatever fails, the second engine and its folder go.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from polymoe.bundle.atomic import exchange, next_folder, remove_next
from polymoe.bundle.live import LiveState
from polymoe.bundle.manifest import Manifest, read_manifest
from polymoe.bundle.rewrite import rewrite_manifest
from polymoe.client.client import AsyncEngineClient
from polymoe.config import format_bytes
from polymoe.errors import ChangeRefusedError, PolymoeError
from polymoe.machine import available_memory
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.planning import PlanJob
from polymoe.server.planner import Planner
from polymoe.server.variant_change import Change
from polymoe.server.variant_set import VariantSet
from polymoe.server.variant_sources import source_of

REPLAN = "-"  # in place of a name, which begins with a letter or a digit
_LOOK_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class NextBundle:
    """What to plan; what other names mean (alias -> name that is planned); names whose versions are pinned."""

    job: PlanJob
    aliases: dict[str, str]
    pinned: list[str]

    def state(self, manifest: Manifest) -> LiveState:
        """Of the planned bundle."""
        versions = {variant.name: variant.version for variant in manifest.variants}
        names = versions | {alias: versions[name] for alias, name in self.aliases.items()}
        return LiveState(names=names, pinned=sorted({versions[name] for name in self.pinned}))


def plan_job(
    names: Mapping[str, VariantInfo], manifest: Manifest, folder: Path, policy: str | None, memory: str | None
) -> tuple[PlanJob, dict[str, str]]:
    """(what to plan, alias -> the name that it is planned under). Raises `ChangeRefusedError` for a source that is
    gone."""
    specs: dict[str, str] = {}
    planned: dict[int, str] = {}  # place -> name
    aliases: dict[str, str] = {}
    for name, info in sorted(names.items(), key=lambda item: item[0] != item[1].name):  # own names first
        if info.place in planned:
            aliases[name] = planned[info.place]
        else:
            planned[info.place] = name
            specs[name] = source_of(info, manifest)
    memory = (manifest.memory or None) if memory is None and policy in (None, manifest.policy) else memory
    out = str(next_folder(folder))
    return PlanJob(specs=specs, policy=policy or manifest.policy, memory=memory, out=out), aliases


def check_memory(needed: int) -> None:
    """Raises `ChangeRefusedError` where two engines would not fit."""
    free = available_memory()
    if free is not None and needed > free:
        raise ChangeRefusedError(
            f"until the new bundle takes over, it is in memory beside the one that is served: it needs about "
            f"{format_bytes(needed)}, {format_bytes(free)} are free. Free some memory, give --memory with less, or "
            "plan beside the server (`polymoe plan`) and restart it."
        )


async def prepared(
    wanted: NextBundle, change: Change, served: AsyncEngineClient, threads: int | None
) -> AsyncEngineClient:
    """An engine that serves the new plan from its own folder. Raises what planning and starting raise; nothing but
    that folder is left then."""
    check_memory(sum(served.info.resident_bytes.values()) + served.config.cache_bytes)
    planner = Planner(threads)  # of its own: variants are added meanwhile
    try:
        await planner.plan_bundle(wanted.job, change.set_progress)
    finally:
        await planner.close()
    folder = Path(wanted.job.out)
    manifest = await asyncio.to_thread(read_manifest, folder)
    if wanted.aliases or wanted.pinned:
        state = wanted.state(manifest)
        await asyncio.to_thread(
            rewrite_manifest, folder, lambda m: msgspec.structs.replace(m, live=state, format_version=3)
        )
    check_memory(manifest.resident_bytes.total + served.config.cache_bytes)
    change.state = "loading"
    client = AsyncEngineClient(msgspec.structs.replace(served.config, bundle=str(folder)), served.module)
    await client.start(change.set_progress)
    return client


def exchange_folders(job: PlanJob, folder: Path) -> None:
    """The new bundle takes the place of the served one. Raises `ChangeRefusedError`; all is as before then."""
    try:
        done = exchange(Path(job.out), folder)
    except OSError as error:
        raise ChangeRefusedError(f"{folder.name} cannot be replaced ({error.strerror}); all is as before.") from error
    if not done:
        raise ChangeRefusedError(
            f"the file system of {folder.name} cannot exchange two folders in one step, so the bundle cannot be "
            "replaced while it is served; plan beside the server and restart it."
        )


async def plan_and_switch(
    change: Change,
    wanted: NextBundle,
    vset: VariantSet,
    served: AsyncEngineClient,
    on_switch: Callable[[AsyncEngineClient], None],
    threads: int | None,
) -> None:
    """`on_switch` is told the second engine when requests are to go there. Raises what planning and starting raise, and
    `ChangeRefusedError` where the set has changed meanwhile; all is as before then."""
    folder, meant = vset.folder, vset.meant
    arrived: AsyncEngineClient | None = None
    switched = False
    try:
        arrived = await prepared(wanted, change, served, threads)
        manifest = await asyncio.to_thread(read_manifest, Path(wanted.job.out))
        async with vset.writing:
            if vset.changes.open_beside(change) or meant != vset.meant:
                raise ChangeRefusedError(
                    "variants were changed while the bundle was planned again; start it again when no change is "
                    "going on.",
                    status=409, code="change_in_progress",
                )  # fmt: skip
            change.state = change.stage = "writing"
            exchange_folders(wanted.job, folder)
            arrived.config = served.config
            vset.client, switched = arrived, True
            on_switch(arrived)
            vset.take(manifest)
    finally:
        if not switched:
            if arrived is not None:
                await asyncio.shield(arrived.shutdown(0.0))
            await asyncio.shield(asyncio.to_thread(remove_next, folder))
    change.state = change.stage = "draining"
    await retire(served, folder)


async def retire(client: AsyncEngineClient, folder: Path) -> None:
    """End an engine when its last request has ended, and remove what it served."""
    try:
        while client.is_alive and client.open_streams:
            await asyncio.sleep(_LOOK_EVERY)
    finally:
        with contextlib.suppress(PolymoeError):
            await asyncio.shield(client.shutdown())
        await asyncio.shield(asyncio.to_thread(remove_next, folder))
