"""Variants that come and go while the engine runs.

A change is read and copied by a thread that gives way to everybody else; `poll`, between two steps, puts what has
arrived in its place, and frees the places whose last sequence has ended.
"""

import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from polymoe.bundle.addition import AddedFiles
from polymoe.bundle.live import Addition
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig, format_bytes
from polymoe.device_memory import cpu_memory
from polymoe.engine.variant_info import added_info
from polymoe.errors import ConfigError, PolymoeError
from polymoe.machine import available_memory, drop_mapped_pages
from polymoe.model.graphs.decode_graphs import DecodeGraphs
from polymoe.model.live_weights import Arriving, LiveWeights
from polymoe.model.stock.skeleton import context_limit
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.messages import ChangeFailed, Message, VariantAdded, VariantDropped

NO_SHARE = 1e-9  # of a place without a variant
_NICE = 15  # of the thread that loads
_RESERVE = 64 << 20  # bytes that are left to the machine where no headroom is given


class Core(Protocol):
    """What `EngineCore` lets it see and change; its comments say what each of these is."""

    config: EngineConfig
    device: torch.device
    bundle: Bundle
    variants: dict[int, VariantInfo]
    max_variants: int
    vocab_size: int
    model: Any
    runner: Any
    scheduler: Any
    counters: Any
    grammars: Any

    def is_running(self, place: int) -> bool: ...


@dataclass(eq=False)
class _Loading:
    change: int
    arriving: Arriving
    done: "Future[None]"
    cancelled: bool = False


def check_live(config: EngineConfig, bundle: Bundle, device: torch.device) -> None:
    """Raises `ConfigError` where variants cannot come and go as the options or the bundle say."""
    live, planned = bundle.manifest.live_state, len(bundle.variants)
    held = max(planned, planned - len(live.removed) + len(live.additions))
    if config.max_variants is None:
        if live.additions or live.removed:
            raise ConfigError(
                f"{bundle.path} has variants that were added or removed while it was served; serve it with "
                f"--max-variants {held} or more, as before."
            )
        return
    if device.type != "cpu" and config.headroom is None:
        raise ConfigError(
            "--max-variants on a GPU needs --headroom, since its memory is divided at the start; give the bytes for "
            "what is added, like 4GiB."
        )
    if device.type != "cpu" and any(bundle.manifest.host_experts):
        raise ConfigError(
            f"--max-variants on a GPU: {bundle.path} has experts that are not on the device; plan it with more "
            "--memory, or leave --max-variants out."
        )
    if config.slots is not None and config.slots < planned:
        raise ConfigError("--max-variants needs a slot for every variant; leave --slots out.")
    if config.max_variants < held:
        raise ConfigError(f"--max-variants {config.max_variants} is less than the {held} versions of {bundle.path}.")


class LiveVariants:
    """The places of an engine: `variants` by place, those that leave, and the one that is on its way."""

    def __init__(self, core: Core, weights: LiveWeights) -> None:
        self._core, self._weights = core, weights
        self._loading: _Loading | None = None
        self._waiting: list[tuple[int, str, Addition]] = []
        self._leaving: dict[int, int] = {}  # place -> change

    @property
    def is_busy(self) -> bool:
        """Whether `poll` has something to look after."""
        behind = self._graphs is not None and self._graphs.is_behind
        return self._loading is not None or bool(self._waiting or self._leaving) or behind

    def add(self, change: int, folder: str, addition: Addition) -> None:
        """Load a version; one at a time."""
        self._waiting.append((change, folder, addition))

    def cancel(self, change: int) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting[0] != change]
        if self._loading is not None and self._loading.change == change:
            self._loading.cancelled = True

    def drop(self, change: int, place: int) -> None:
        """Free a place when its last sequence has ended."""
        self._leaving[place] = change

    def poll(self) -> list[Message]:
        """Between two steps."""
        events: list[Message] = []
        self._catch_up()
        events += self._drop_idle()
        if self._loading is not None and self._loading.done.done():
            events.append(self._arrived(self._loading))
            self._loading = None
        if self._loading is None and self._waiting:
            change, folder, addition = self._waiting.pop(0)
            try:
                self._loading = self._start(change, folder, addition)
            except (PolymoeError, RuntimeError, OSError) as error:  # RuntimeError: the allocator's
                events.append(ChangeFailed(change, str(error)))
        if self._weights.take_change() and self._graphs is not None:
            self._graphs.drop()
        return events

    @property
    def _graphs(self) -> DecodeGraphs | None:
        found: DecodeGraphs | None = self._core.runner.graphs
        return found

    def _catch_up(self) -> None:
        """What has changed is captured again, a graph at a time."""
        if self._graphs is not None and self._graphs.is_behind:
            self._graphs.catch_up()

    def restore(self) -> None:
        """At the start: the set of versions that was served last. Raises `PolymoeError`."""
        bundle = self._core.bundle
        live = bundle.manifest.live_state
        for place, record in enumerate(bundle.variants):
            if record.version in live.removed:
                self._free(place)
        for addition in live.additions:
            arriving = self._reserve(str(bundle.path / addition.folder), addition)
            self._weights.load(arriving)
            self._install(arriving)
        self._weights.take_change()  # nothing is captured yet

    def names(self) -> dict[str, int]:
        """What names mean, as it was when the bundle was served last: name -> place."""
        live = self._core.bundle.manifest.live_state
        found = {}
        for name, version in live.names.items():
            places = [p for p, info in self._core.variants.items() if info.version == version]
            found[name] = next((p for p in places if self._core.variants[p].name == name), places[0])
        return found

    @property
    def added_bytes(self) -> int:
        planned = len(self._core.bundle.variants)
        return sum(self._weights.bytes_of(place) for place in self._core.variants if place >= planned)

    def _start(self, change: int, folder: str, addition: Addition) -> _Loading:
        loading = _Loading(change, self._reserve(folder, addition), Future())

        def load() -> None:
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
                self._weights.load(loading.arriving)
                drop_mapped_pages(loading.arriving.files.folder)
            except BaseException as error:
                loading.done.set_exception(error)
            else:
                loading.done.set_result(None)

        threading.Thread(target=load, name="polymoe-variant", daemon=True).start()
        return loading

    def _reserve(self, folder: str, addition: Addition) -> Arriving:
        core = self._core
        files = AddedFiles(Path(folder), addition, core.bundle.manifest)
        taken = len(core.variants)
        if taken >= core.max_variants:
            held = ", ".join(sorted(info.key[: len(info.name) + 9] for info in core.variants.values()))
            raise ConfigError(
                f"{taken} versions are held ({held}), which is all that --max-variants {core.max_variants} allows; "
                "remove one, unpin one, or restart with more."
            )
        needed, free = self._weights.demand(files) or (addition.device_bytes, self.free_bytes)
        if needed > free:
            raise ConfigError(
                f"{addition.name} needs {format_bytes(needed)} on the device, {format_bytes(max(0, free))} are free "
                "for what is added; remove another one, give fewer bits, or restart with a larger --headroom."
            )
        if addition.vocab_size > core.vocab_size:
            raise ConfigError(
                f"{addition.name} has {addition.vocab_size} rows of vocabulary, the model that is served has room for "
                f"{core.vocab_size}; plan a new bundle with it."
            )
        first = len(core.bundle.variants)
        place = next(p for p in range(first, first + core.max_variants) if p not in core.variants)
        return self._weights.reserve(place, files)

    @property
    def free_bytes(self) -> int:
        """For what is added."""
        headroom = self._core.config.headroom
        if headroom is not None:
            return headroom - self.added_bytes
        return (available_memory() or cpu_memory()) - _RESERVE

    def _arrived(self, loading: _Loading) -> Message:
        error = loading.done.exception()
        if error is None and not loading.cancelled:
            try:
                return VariantAdded(loading.change, self._install(loading.arriving))
            except PolymoeError as refused:
                error = refused
        self._weights.cancel(loading.arriving)
        message = "it was given up" if error is None else str(error)
        return ChangeFailed(loading.change, message)

    def _install(self, arriving: Arriving) -> VariantInfo:
        core, place, files = self._core, arriving.place, arriving.files
        limit = min(context_limit(files.config), files.addition.max_model_len, max(core.scheduler.max_model_len))
        length = min(limit, core.config.max_model_len or limit)
        info = added_info(files, length, place)
        self._weights.install(arriving)
        info = msgspec.structs.replace(info, device_bytes=self._weights.bytes_of(place))
        core.variants[place] = info
        core.runner.vocab_sizes[place] = info.vocab_size
        core.scheduler.set_place(place, length, core.config.weights.get(info.name, 1.0))
        return info

    def _drop_idle(self) -> list[Message]:
        events: list[Message] = []
        for place, change in list(self._leaving.items()):
            if not self._core.is_running(place):
                del self._leaving[place]
                self._free(place)
                events.append(VariantDropped(change, place))
        return events

    def _free(self, place: int) -> None:
        core = self._core
        info = core.variants.pop(place, None)
        if info is None:
            return
        core.counters.retire(place, info.name)
        core.scheduler.set_place(place, core.scheduler.max_model_len[place], NO_SHARE)
        self._weights.remove(place)
        core.grammars.forget(info)
