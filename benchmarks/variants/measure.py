"""What a change of the set of variants costs those that are served: inter-token latency while a fifth is added, and how
long a patch takes from its file to its first token.

    python benchmarks/variants/measure.py --families FOLDER --work FOLDER [--in-flight 32] [--only patch]

Random Mixtrals of 430M parameters in bfloat16, four served losslessly (two, where only a patch is timed). Ends with one
line of JSON.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from polymoe.bench.family import cached_family
from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.offline.api import make_plan
from polymoe.protocol.request import SamplingParams
from polymoe.server.settings import ServerSettings
from polymoe.server.variants import Variants

_PROMPT, _OUTPUT = 32, 64


def write_patch(base: Path, out: Path, share: float) -> None:
    """A share of the values of every tensor, as an RL step changes them."""
    generator = torch.Generator().manual_seed(0)
    patch: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        count = max(1, int(share * tensor.numel()))
        places = torch.unique(torch.randint(tensor.numel(), (count,), generator=generator))
        values = tensor.flatten()[places] * 1.01 + 0.001
        patch |= {f"{name}.indices": places.int(), f"{name}.values": values}
        patch[f"{name}.shape"] = torch.tensor(tensor.shape)
    save_file(patch, out)


class Load:
    """Keeps a number of requests in flight and notes when each token comes."""

    def __init__(self, client: AsyncEngineClient, names: list[str], in_flight: int) -> None:
        self.client, self.names = client, names
        self.gaps: list[tuple[float, float]] = []  # (when, seconds since the token before)
        self.failed = 0
        self._tasks = [asyncio.create_task(self._run(i)) for i in range(in_flight)]
        self._stopped = False

    async def _run(self, index: int) -> None:
        rng = random.Random(index)
        number = 0
        while not self._stopped:
            prompt = [rng.randrange(4096) for _ in range(_PROMPT)]
            # The first is cut, so that prompts do not come in waves, whose gaps would be most of the 99th percentile.
            length = _OUTPUT if number else rng.randrange(1, _OUTPUT)
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            last, number = None, number + 1
            try:
                name = self.names[index % len(self.names)]
                async for chunk in self.client.generate(f"r{index}-{number}", name, (None, prompt), sampling):
                    now = time.monotonic()
                    if last is not None and chunk.token_ids:
                        self.gaps.append((now, now - last))
                    last = now
            except Exception:
                self.failed += 1

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    def p99(self, start: float, end: float) -> float:
        gaps = sorted(gap for at, gap in self.gaps if start <= at <= end)
        return gaps[int(0.99 * len(gaps))]


async def measure(paths: dict[str, Path], work: Path, in_flight: int, only_patch: bool) -> dict[str, Any]:
    names = list(paths)[: 2 if only_patch else 4]
    shutil.rmtree(work / "bundle", ignore_errors=True)
    make_plan({name: paths[name] for name in names}, "separate", None, work / "bundle")
    client = AsyncEngineClient(EngineConfig(bundle=str(work / "bundle"), device="cpu", max_variants=7))
    await client.start()
    root = next(iter(paths.values())).parent
    variants = Variants(client, ServerSettings(variants_root=root))
    await variants.start()
    await asyncio.sleep(15)  # the planner imports what it needs
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    if not only_patch:
        found |= await added(client, variants, names, paths["v4"], in_flight)
    found |= await patched(client, variants, root / "patch.safetensors")
    await variants.close()
    await client.shutdown()
    return found


async def added(
    client: AsyncEngineClient, variants: Variants, names: list[str], source: Path, in_flight: int
) -> dict[str, Any]:
    """A fifth variant beside the load."""
    load = Load(client, names, in_flight)
    await asyncio.sleep(20)
    begun = time.monotonic()
    change = await variants.add("fifth", str(source))
    await variants.changes.wait(change)
    ended = time.monotonic()
    assert change.error is None, change.error
    quiet, busy = load.p99(begun - 15, begun), load.p99(begun, ended)
    await load.stop()
    return {
        "p99_itl_before_s": round(quiet, 4), "p99_itl_while_adding_s": round(busy, 4),
        "ratio": round(busy / quiet, 2), "add_s": round(ended - begun, 1), "failed": load.failed,
        "median_itl_s": round(statistics.median(gap for _, gap in load.gaps), 4),
    }  # fmt: skip


async def patched(client: AsyncEngineClient, variants: Variants, patch: Path) -> dict[str, Any]:
    """A patch of one that is served, from its file to the first token; a second one, when the planner is warm."""
    found: dict[str, Any] = {}
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for name, key in (("v0", "patch"), ("v1", "second_patch")):
        begun, stages = time.monotonic(), dict[str, float]()
        change = await variants.add(name, f"{name}+{patch}", replaces=True)
        while change.is_open:
            stages.setdefault(f"{change.state}: {change.stage}", round(time.monotonic() - begun, 2))
            await asyncio.sleep(0.01)
        assert change.error is None, change.error
        served = time.monotonic()
        async for _ in client.generate(f"first-{name}", name, (None, [5, 6, 7]), sampling):
            pass
        found |= {f"{key}_s": round(served - begun, 2), f"{key}_began": stages}
        found[f"{key}_to_first_token_s"] = round(time.monotonic() - begun, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--shape", default="430m")
    parser.add_argument("--only", choices=["patch"])
    parser.add_argument("--prepare", action="store_true", help="make the checkpoints, and nothing else")
    options = parser.parse_args()
    paths = cached_family(options.families, 5, options.shape)
    patch = next(iter(paths.values())).parent / "patch.safetensors"
    if not patch.exists():
        write_patch(paths["v0"], patch, 0.02)
    if not options.prepare:
        options.work.mkdir(parents=True, exist_ok=True)
        print(json.dumps(asyncio.run(measure(paths, options.work, options.in_flight, options.only == "patch"))))


if __name__ == "__main__":
    main()
