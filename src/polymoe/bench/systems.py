"""The systems that are compared, each on real engines in processes of their own, behind one small interface.

| system        | engines | what it has |
|---------------|---------|-------------|
| `mixed`       | 1       | one bundle of all variants, one batch mixes them |
| `single`      | 1       | the same engine and bundle; one variant gets the whole load: the ideal |
| `per-variant` | 1       | the same, but a step runs one variant only |
| `reconfigure` | 1       | the same with one slot: non-experts are loaded when a step needs them |
| `paper`       | 1       | Algorithm 2 of arXiv 2505.06481: batch of one, one slot, a miss blocks |
| `swap`        | 1       | whole models in turn, see `polymoe.bench.swap` |
| `partition`   | N       | 1/N of the cores and the memory each, see `polymoe.bench.partition` |
| `transformers`| none    | stock models, one variant's batch at a time, see `polymoe.bench.stock` |

The first five may have a bundle of their own: `mixed:auto`, `mixed:auto@0.55x` (policy, then its `--memory`).
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.machine import peak_rss
from polymoe.protocol.request import SamplingParams

DEFAULT_SYSTEMS = ("mixed", "single", "per-variant", "reconfigure", "paper", "swap", "partition")
SYSTEMS = (*DEFAULT_SYSTEMS, "transformers")
ON_ONE_BUNDLE = DEFAULT_SYSTEMS[:5]


@dataclass(frozen=True)
class Counters:
    """Totals since the start of a system, of all its engines."""

    reconfigurations: int = 0
    reconfiguration_s: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0
    host_bytes: int = 0  # experts and non-experts read from the host tier; for `swap` whole models
    model_loads: int = 0
    model_load_s: float = 0.0
    peak_rss_bytes: int | None = None  # of the engine's process; several at once are added

    def since(self, before: "Counters") -> "Counters":
        """What was counted after `before`; the peak stays the peak."""
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in _COUNTED})

    def __add__(self, other: "Counters") -> "Counters":
        known = [peak for peak in (self.peak_rss_bytes, other.peak_rss_bytes) if peak is not None]
        totals = {name: getattr(self, name) + getattr(other, name) for name in _COUNTED}
        return replace(self, **totals, peak_rss_bytes=sum(known) if known else None)


_COUNTED = [field.name for field in fields(Counters) if field.name != "peak_rss_bytes"]


class System(Protocol):
    """Something that serves all variants. Methods belong to one event loop."""

    async def start(self) -> None:
        """Load; raises `PolymoeError` when that is not possible."""

    async def stop(self) -> None:
        """End its processes. Idempotent."""

    def generate(self, variant: str, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        """Greedy tokens after a prompt of token ids, exactly `output_tokens`: yields how many have come. Closing it
        gives the request up."""

    async def counters(self) -> Counters:
        """Answered between two steps of the engine, so what was given up before is gone by then."""


class EngineSystem:
    """One engine. With `only`, that variant gets every request whatever it asks for.

    `module`: what its process runs.
    """

    def __init__(self, config: EngineConfig, only: str | None = None, module: str = "polymoe.engine.process") -> None:
        self.config, self.only, self.module = config, only, module
        self.client = AsyncEngineClient(config, module)
        self._count = 0

    async def start(self) -> None:
        await self.client.start()

    async def stop(self) -> None:
        await self.client.shutdown()

    async def generate(self, variant: str, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        self._count += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        name = f"bench-{self._count}"
        with await self.client.submit(name, self.only or variant, [(None, prompt)], sampling) as stream:
            async for chunks in stream:
                if count := sum(len(chunk.token_ids) for chunk in chunks):
                    yield count

    async def counters(self) -> Counters:
        stats = await self.client.stats()
        assert self.client.pid is not None
        return Counters(
            reconfigurations=stats.reconfigurations,
            reconfiguration_s=stats.reconfiguration_seconds,
            expert_hits=stats.expert_hits,
            expert_misses=stats.expert_misses,
            host_bytes=stats.expert_host_bytes + stats.reconfiguration_bytes,
            peak_rss_bytes=peak_rss(self.client.pid),
        )

    async def kv_bytes_per_token(self) -> float:
        """Bytes that one token of context takes in the KV cache."""
        stats, info = await self.client.stats(), self.client.info
        return stats.resident_bytes["kv_cache"] / (info.num_kv_blocks * info.block_size)
