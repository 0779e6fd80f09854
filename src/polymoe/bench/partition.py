"""`partition`: the device cut into N equal parts, one variant each, as MIG cuts a GPU.

Part n has its own engine process, pinned with all its threads to 1/N of the cores; 1/N of the weight bytes that `mixed`
holds (its non-experts, and as many of its experts as then fit; the rest is absent and fetched from the host tier, with
what is left of the share as the cache for them); and 1/N of the KV cache. The host's page cache and the bandwidth of
the memory are shared, which is more than MIG grants.
"""

from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from polymoe.bench.systems import Counters, EngineSystem
from polymoe.config import EngineConfig
from polymoe.machine import only_on


class PartitionSystem:
    """One `EngineSystem` a variant. `configs`: variant -> its engine; `cores`: of each, in the same order.

    `module`: what their processes run.
    """

    def __init__(
        self,
        configs: Mapping[str, EngineConfig],
        cores: Sequence[Sequence[int]],
        module: str = "polymoe.engine.process",
    ) -> None:
        self.cores = cores
        self.parts = {
            variant: EngineSystem(msgspec.structs.replace(config, num_threads=len(own)), module=module)
            for (variant, config), own in zip(configs.items(), cores, strict=True)
        }

    async def start(self) -> None:
        for part, own in zip(self.parts.values(), self.cores, strict=True):
            with only_on(own):
                await part.start()

    async def stop(self) -> None:
        for part in self.parts.values():
            await part.stop()

    def generate(self, variant: str, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        return self.parts[variant].generate(variant, prompt, output_tokens)

    async def counters(self) -> Counters:
        total = Counters()
        for part in self.parts.values():
            total += await part.counters()
        return total
