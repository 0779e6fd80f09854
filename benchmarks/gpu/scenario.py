"""The paper's scenario (arXiv 2505.06481): two Mixtral-8x7B on one GPU, Poisson arrivals, 20 tokens in and 25 out.

Only one system fits the GPU at a time, so they run one after the other, each in engine processes of its own, through
the load generator and figures of `polymoe bench qos`. All get the same arrivals.

| system | on the device |
|---|---|
| mixed, single | int4 base, 3-bit deltas of both variants, nothing absent; `single` sends all to one variant |
| reconfigure | the same with one slot |
| paper | bfloat16, one expert a position for both, as many as fit (the paper: 217 of 256); one slot, batch of one |
| partition | two processes with half the memory each, a variant whole in int4 in each; multiprocessors by time slices |
| swap | one variant's whole model in int4 at a time, each load a process of its own |
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from polymoe.bench.load import run_open
from polymoe.bench.metrics import DEFAULT_SLO
from polymoe.bench.partition import PartitionSystem
from polymoe.bench.session import Session
from polymoe.bench.swap import SwapSystem
from polymoe.bench.systems import EngineSystem, System
from polymoe.bench.workload import Arrival, Lengths, poisson_arrivals, random_prompts
from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.machine import available_cores
from synthetic_bundle import Layout

MODULE = "engine_process"
PARTITION = (
    "two processes with half the memory each; the multiprocessors are shared by time slices, which gives one process "
    "all of them while the other is idle. Green contexts of two processes would be time-sliced on top and halve twice."
)
_EXPERT_BYTES, _NONEXPERT_BYTES, _OTHER_BYTES = 352.4e6, 3.3e9, 7.5e9
_INT4_BYTES = 26_100_000_000  # of one variant: 256 experts in int4, and non-experts


class Scenario:
    """The systems and the arrivals. `rates`: requests a second of each variant -> seconds of arrivals."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.lengths = Lengths(4, 3) if tiny else Lengths(20, 25)
        self.rates = {1.0: 2.0} if tiny else {0.08: 8.0, 2.0: 4.0, 20.0: 4.0}
        self.drain = 60.0 if tiny else 4.0
        self.variants = ["v0", "v1"]
        total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
        self.fits = max(int((total - _NONEXPERT_BYTES - _OTHER_BYTES) / _EXPERT_BYTES), 1) if total else 6

    def arrivals(self, rate: float) -> list[Arrival]:
        """At the lowest rates chance may send nobody in so short a time: the first seed that sends three."""
        for seed in range(1000):
            found = poisson_arrivals(dict.fromkeys(self.variants, rate), self.rates[rate], self.lengths, seed)
            if len(found) >= 3:
                return found
        raise AssertionError("no seed sends three requests")

    def config(
        self, variants: int, parts: int = 1, layout: dict[str, Any] | None = None, **options: Any
    ) -> EngineConfig:
        fields = {"device": self.device, "dtype": "bfloat16" if self.device == "cuda" else "float32", **(layout or {})}
        shape = "tiny-mixtral" if self.tiny else "mixtral-8x7b"
        described = json.dumps({"layout": asdict(Layout(shape, variants, **fields)), "parts": parts})
        settings: dict[str, Any] = {
            "device": self.device, "dtype": fields["dtype"], "max_num_seqs": 4 if self.tiny else 64,
            "max_model_len": 64 if self.tiny else 8192, "max_num_batched_tokens": 32 if self.tiny else 4096,
            "max_waiting": 1 << 20, "admission_factor": None, "expert_cache_bytes": 0 if self.tiny else 1 << 30,
            "kv_cache_bytes": (1 << 20) if self.tiny else (2 << 30) // parts,
        }  # fmt: skip
        return EngineConfig(bundle=described, **(settings | options))

    def systems(self) -> list[tuple[str, System]]:
        """Not started. `single` follows `mixed` and uses its engine."""
        compressed = {"base": "int4", "delta": "d3"}
        stored = {"resident": self.fits, "host": True}
        mixed = EngineSystem(self.config(2, layout=compressed), module=MODULE)
        single = EngineSystem(mixed.config, "v0", module=MODULE)
        single.client = mixed.client
        # A staging row would be a second slot for the second of two variants.
        one_slot = self.config(2, layout=compressed, slots=1, prefetch=False)
        paper = self.config(
            2, layout=stored, slots=1, prefetch=False, max_num_seqs=1, expert_cache_bytes=0, enable_prefix_caching=False
        )
        # Whole models in what `mixed` has as its base: of bfloat16 a half of the device would hold a third.
        own = [{"base": "int4", "host": True, "first": i} for i in range(len(self.variants))]
        whole = {v: self.config(1, layout=layout) for v, layout in zip(self.variants, own, strict=True)}
        halved = {v: self.config(1, 2, layout) for v, layout in zip(self.variants, own, strict=True)}
        cores = available_cores()
        halves = [cores[::2], cores[1::2] or cores]
        return [
            ("mixed", mixed),
            ("single", single),
            ("reconfigure", EngineSystem(one_slot, module=MODULE)),
            ("paper", EngineSystem(paper, module=MODULE)),
            ("partition", PartitionSystem(halved, halves, MODULE)),
            ("swap", SwapSystem(whole, dict.fromkeys(self.variants, _INT4_BYTES), MODULE)),
        ]


async def run(scenario: Scenario, seconds: float, out: Path) -> dict[str, Any]:
    """All systems that fit into the time; the result so far is written after each."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"partition": PARTITION, "lengths": str(scenario.lengths), "systems": {}}
    previous: System | None = None
    for name, system in scenario.systems():
        try:
            async with asyncio.timeout(max(end - time.monotonic(), 0.01)):
                if name != "single":
                    if previous is not None:
                        await previous.stop()
                    previous = system
                    await system.start()
                report["systems"][name] = await _measure(scenario, name, system)
        except TimeoutError:
            report["systems"][name] = {"skipped": "out of time"}
        except Exception as problem:  # the others go on
            report["systems"][name] = {"failed": f"{type(problem).__name__}: {problem}"}
        out.write_text(json.dumps(report))
    if previous is not None:
        await previous.stop()
    return report


async def _measure(scenario: Scenario, name: str, system: System) -> dict[str, Any]:
    session = Session({name: system}, scenario.variants, 100, DEFAULT_SLO, Console(stderr=True))
    await session.warm_up(name, 2 if scenario.tiny else 32, scenario.lengths)
    found = {}
    for rate, duration in scenario.rates.items():
        arrivals = scenario.arrivals(rate)
        prompts = random_prompts(arrivals, 100, seed=0)
        load = partial(
            run_open, arrivals=arrivals, prompts=prompts, duration=duration, drain=scenario.drain, on_done=lambda: None
        )
        done, summary = await session.measure(name, load)
        found[f"{rate:g}"] = {**msgspec.to_builtins(summary), "run_s": done.ended}
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="real")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    scenario = Scenario(arguments.device, arguments.shape == "tiny")
    report = asyncio.run(run(scenario, arguments.seconds, arguments.out))
    return int(any("failed" in figures for figures in report["systems"].values()))


if __name__ == "__main__":
    sys.exit(main())
