"""One look at the server a second, however many browsers watch; the last quarter of an hour is kept."""

import asyncio
import base64
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
import numpy as np

from polymoe.client.interface import EngineClient
from polymoe.errors import EngineDeadError
from polymoe.protocol.info import EngineStats
from polymoe.server.metrics import Metrics
from polymoe.server.recent import Percentiles
from polymoe.server.request_log import RequestLog, RequestRecord
from polymoe.server.settings import ServerSettings

logger = logging.getLogger(__name__)
_EVERY = 1.0  # seconds
_KEPT = 900  # snapshots
_STATS_TIMEOUT = 2.0  # seconds; a step of the engine may take longer, and then there are no figures of it
_ROUTING_EVERY = 3  # snapshots between two pictures of what is routed where
_MOST_RECORDS = 200  # requests in one event
_encode = msgspec.json.Encoder().encode


class Watched(Protocol):
    """What is looked at: `ServerState`."""

    client: EngineClient
    settings: ServerSettings
    metrics: Metrics
    requests: RequestLog
    draining: bool
    progress: tuple[str, float]

    @property
    def revision(self) -> int: ...


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Lists are by variant, in the order of the engine's info; rates are a second, times are seconds."""

    time: float  # since the epoch
    status: str  # loading, ready, draining, stuck or dead
    stage: str = ""
    fraction: float = 0.0
    variants: list[str] = []
    revision: int = 0  # of the set of variants: grows with each change
    running: list[int] = []
    waiting: list[int] = []
    kv_usage: float = 0.0
    tokens: list[float] = []  # generated
    prompt_tokens: list[float] = []
    errors: list[float] = []  # refused, failed or given up
    ttft: list[Percentiles] = []
    itl: list[Percentiles] = []
    prefix_queries: float = 0.0  # tokens
    prefix_hits: float = 0.0  # tokens
    preemptions: float = 0.0
    reconfigurations: float = 0.0
    reconfiguration_bytes: float = 0.0
    host_bytes: float = 0.0  # of absent experts
    resident_bytes: dict[str, int] = {}


class Snapshots:
    """Takes snapshots while the server runs, and gives them to whoever watches."""

    def __init__(self, state: Watched) -> None:
        self._state = state
        self._kept: deque[Snapshot] = deque(maxlen=_KEPT)
        self._frame = b""
        self._next = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._watchers = 0
        self._before: tuple[float, EngineStats | None] = (time.monotonic(), None)
        self._revision = 0  # of the request log, that was sent

    @property
    def latest(self) -> Snapshot | None:
        return self._kept[-1] if self._kept else None

    def start(self) -> None:
        """Idempotent."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events: what is kept, then one frame a snapshot. A reader that is slow misses some. It ends when
        the server drains."""
        self.start()
        self._watchers += 1
        try:
            yield _event("history", [*self._kept])
            yield _event("requests", self._state.requests.since(0))
            while not self._state.draining:
                await self._next.wait()
                yield self._frame
        finally:
            self._watchers -= 1

    async def _run(self) -> None:
        turn = 0
        while True:
            started = time.monotonic()
            turn += 1
            try:
                await self._take(routing=self._watchers > 0 and turn % _ROUTING_EVERY == 0)
            except Exception:  # the next second may go well, and whoever watches waits for it
                logger.exception("A snapshot failed.")
            await asyncio.sleep(max(0.05, _EVERY - (time.monotonic() - started)))

    async def _take(self, routing: bool) -> None:
        stats = await self._stats(routing)
        snapshot = self._snapshot(stats)
        parts = []
        names = snapshot.variants
        if names and any(kept.variants not in ([], names) for kept in self._kept):  # the set of variants has changed
            self._kept = deque((in_order(kept, names) for kept in self._kept), _KEPT)
            parts.append(_event("history", [*self._kept]))
        self._kept.append(snapshot)
        parts.append(_event("snapshot", snapshot))
        changed = self._state.requests.since(self._revision)[-_MOST_RECORDS:]
        if changed:
            self._revision = self._state.requests.revision
            parts.append(_event("requests", changed))
        if stats is not None and stats.routing is not None:
            parts.append(_event("routing", _shares(stats.routing, len(stats.running))))
        self._frame = b"".join(parts)
        event, self._next = self._next, asyncio.Event()
        event.set()

    async def _stats(self, routing: bool) -> EngineStats | None:
        client = self._state.client
        if not client.is_ready:
            return None
        with contextlib.suppress(TimeoutError, EngineDeadError):
            return await asyncio.wait_for(client.stats(routing), _STATS_TIMEOUT)
        return None

    def _status(self) -> str:
        state, client = self._state, self._state.client
        if client.dead.is_set():
            return "dead"
        if client.is_stuck(state.settings.heartbeat_timeout):
            return "stuck"
        return "draining" if state.draining else "ready" if client.is_ready else "loading"

    def _snapshot(self, stats: EngineStats | None) -> Snapshot:
        now, status, (stage, fraction) = time.time(), self._status(), self._state.progress
        clock = time.monotonic()
        then, before = self._before
        span, self._before = max(clock - then, 1e-3), (clock, stats)
        recent = self._state.metrics.recent
        second = recent.turn()
        if not self._state.client.is_ready:
            return Snapshot(time=now, status=status, stage=stage, fraction=fraction)
        names = [variant.name for variant in self._state.client.info.variants]
        done = [second.get(name) for name in names]
        latencies = [recent.percentiles(name) for name in names]

        def rate(count: float) -> float:
            return round(max(count, 0.0) / span, 3)  # another engine counts from 0

        found: dict[str, Any] = {
            "tokens": [rate(0 if one is None else one.tokens) for one in done],
            "prompt_tokens": [rate(0 if one is None else one.prompt_tokens) for one in done],
            "errors": [rate(0 if one is None else one.errors) for one in done],
            "ttft": [ttft for ttft, _ in latencies],
            "itl": [itl for _, itl in latencies],
        }
        if stats is not None:
            found |= {
                "running": _of(names, stats.names, stats.running),
                "waiting": _of(names, stats.names, stats.waiting),
                "kv_usage": round(stats.kv_usage, 4),
                "resident_bytes": stats.resident_bytes,
            }
        if stats is not None and before is not None:
            found |= {
                "prefix_queries": rate(sum(stats.prefix_cache_queries) - sum(before.prefix_cache_queries)),
                "prefix_hits": rate(sum(stats.prefix_cache_hits) - sum(before.prefix_cache_hits)),
                "preemptions": rate(sum(stats.preemptions) - sum(before.preemptions)),
                "reconfigurations": rate(stats.reconfigurations - before.reconfigurations),
                "reconfiguration_bytes": rate(stats.reconfiguration_bytes - before.reconfiguration_bytes),
                "host_bytes": rate(stats.expert_host_bytes - before.expert_host_bytes),
            }
        found |= {"variants": names, "revision": self._state.revision}
        return Snapshot(time=now, status=status, stage="", fraction=1.0, **found)


def in_order(snapshot: Snapshot, names: list[str]) -> Snapshot:
    """The same with the values of these variants, in their order: who was not there yet did nothing."""
    if snapshot.variants in ([], names):
        return snapshot
    places = [snapshot.variants.index(name) if name in snapshot.variants else None for name in names]
    found: dict[str, Any] = {"variants": names}
    for field in ("running", "waiting", "tokens", "prompt_tokens", "errors", "ttft", "itl"):
        values, nothing = getattr(snapshot, field), None if field in ("ttft", "itl") else 0
        if values:  # a snapshot without an engine's answer has none of some
            found[field] = [nothing if place is None else values[place] for place in places]
    return msgspec.structs.replace(snapshot, **found)


def _of(names: list[str], counted: list[str], values: list[int]) -> list[int]:
    """The values of these names; other names mean what somebody else counts."""
    known = dict(zip(counted, values, strict=True))
    return [known.get(name, 0) for name in names]


def _shares(counts: bytes, num_variants: int) -> dict[str, Any]:
    """What was routed, as uint16 [V, L, E] in base64: the counts, or, where one is too large, all of them scaled."""
    found = np.frombuffer(counts, dtype="<u4").astype(np.float64)
    most = float(found.max(initial=0.0))
    scale = max(1.0, most / 65535)
    small = (found / scale).astype("<u2").tobytes()
    return {"scale": scale, "variants": num_variants, "counts": base64.b64encode(small).decode()}


def _event(name: str, data: Snapshot | dict[str, Any] | list[Snapshot] | list[RequestRecord]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(data) + b"\n\n"
