"""The timed parts, a process each: `python model_parts.py NAME --device … --shape … --out FILE`.

Each writes one JSON object. Decode: median seconds of the engine's step, the bytes it must read, and the share of the
measured bandwidth that makes. Speeds do not depend on weights' values; routing is near uniform, so more experts are
touched than by trained routers.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine_load import add, decode_bytes, decode_seconds, first_token_seconds, load_engine, prefill_flops
from measure import Limits, best_seconds, measure_limits, synchronize
from polymoe.engine.core import EngineCore
from polymoe.model.experts.tier_cost import TierCosts
from synthetic_bundle import Layout

Figures = dict[str, Any]


class Setting:
    """Where and how large. `tiny` tries the script: its figures mean nothing."""

    def __init__(self, device: str, shape: str) -> None:
        self.device, self.tiny = torch.device(device), shape == "tiny"
        self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.steps, self.prompt, self.large = (1, 16, 2) if self.tiny else (40, 4096, 64)
        self.switch_prompt = 8 if self.tiny else 1000
        self.context = 2 if self.tiny else 128
        self.limits: Limits = measure_limits(self.device, getattr(torch, self.dtype))

    def layout(self, shape: str, variants: int, **options: Any) -> Layout:
        if self.tiny:
            shape = {"mixtral-8x7b": "tiny-mixtral", "qwen3-30b-a3b": "tiny-qwen3"}[shape]
        return Layout(shape, variants, device=str(self.device), dtype=self.dtype, **options)


def decode(core: EngineCore, setting: Setting, variants: list[int]) -> Figures:
    """One sequence for each entry of `variants`."""
    seconds = decode_seconds(core, variants, setting.context, setting.steps)
    wanted = decode_bytes(core, variants, setting.context + setting.steps / 2)
    ceiling = wanted / setting.limits.memory_bytes_per_s
    return {
        "batch": len(variants),
        "variants": len(set(variants)),
        "seconds": seconds,
        "tokens_per_s": len(variants) / seconds,
        "bytes": wanted,
        "ceiling_seconds": ceiling,
        "share": ceiling / seconds,
    }


def prefill(core: EngineCore, setting: Setting) -> Figures:
    """One prompt in one step."""
    seconds = min(first_token_seconds(core, 0, setting.prompt) for _ in range(2 if setting.tiny else 4))
    flops = prefill_flops(core, setting.prompt)
    rate = flops / seconds
    return {"tokens": setting.prompt, "seconds": seconds, "flops": flops, "share": rate / setting.limits.matmul_flops}


def _resident(core: EngineCore) -> Figures:
    return {
        "experts_absent": core.info.experts_absent,
        "resident_bytes": core.model.resident_bytes,
        "kv_tokens": core.info.num_kv_blocks * core.info.block_size,
        "graphs": 0 if core.runner.graphs is None else core.runner.graphs.num_captured,
    }


def _spread(count: int, variants: int) -> list[int]:
    return [i % variants for i in range(count)]


def _compressed(setting: Setting, shape: str, variants: int, delta: str) -> Figures:
    core = load_engine(setting.layout(shape, variants, base="int4", delta=delta), max_num_seqs=setting.large)
    return {
        **_resident(core),
        "decode_1": decode(core, setting, [0]),
        "decode_64": decode(core, setting, _spread(setting.large, variants)),
        "prefill": prefill(core, setting),
    }


def mixtral_two(setting: Setting) -> Figures:
    return _compressed(setting, "mixtral-8x7b", 2, "d3")


def mixtral_four(setting: Setting) -> Figures:
    return _compressed(setting, "mixtral-8x7b", 4, "d1")


def qwen3_delta(setting: Setting) -> Figures:
    return _compressed(setting, "qwen3-30b-a3b", 4, "d2")


def qwen3_shared(setting: Setting) -> Figures:
    """Four variants share every expert, as stored; and one of them alone in the same engine."""
    core = load_engine(setting.layout("qwen3-30b-a3b", 4), max_num_seqs=setting.large)
    mixed, single = [], []
    for _ in range(1 if setting.tiny else 3):  # in turn, so that noise hits both alike
        mixed.append(decode(core, setting, _spread(setting.large, 4)))
        single.append(decode(core, setting, [0] * setting.large))
    found = [statistics.median(run["tokens_per_s"] for run in runs) for runs in (mixed, single)]
    return {
        **_resident(core),
        "decode_1": decode(core, setting, [0]),
        "decode_64": mixed[-1],
        "decode_64_single": single[-1],
        "mixed_over_single": found[0] / found[1],
        "prefill": prefill(core, setting),
    }


def mixtral_switch(setting: Setting) -> Figures:
    """One slot for two variants: what a reconfiguration takes, and what it adds to the time to the first token."""
    layout = setting.layout("mixtral-8x7b", 2, base="int4", host=True)
    core = load_engine(layout, slots=1, prefetch=False, max_num_seqs=4)
    slots, device = core.model.slots, setting.device
    turn = [0]

    def switch() -> None:
        turn[0] = 1 - turn[0]
        slots.ensure({turn[0]})
        slots.wait_all()

    before = slots.stats.nbytes
    switch()
    synchronize(device)
    nbytes = slots.stats.nbytes - before
    seconds = best_seconds(device, switch, 3 if setting.tiny else 6)
    plain, switched = [], []
    for _ in range(2 if setting.tiny else 6):
        current = next(iter(slots.loaded))
        plain.append(first_token_seconds(core, current, setting.switch_prompt))
        switched.append(first_token_seconds(core, 1 - current, setting.switch_prompt))
    without, with_switch = statistics.median(plain), statistics.median(switched)
    exposed = max(seconds - without, 0.0)
    return {
        **_resident(core),
        "reconfiguration": {
            "bytes": nbytes, "seconds": seconds, "share": nbytes / seconds / setting.limits.bus_bytes_per_s,
        },
        "ttft": {
            "prompt_tokens": setting.switch_prompt, "without_switch": without, "with_switch": with_switch,
            "added": with_switch - without, "transfer": seconds, "transfer_beyond_compute": exposed,
            "added_over_transfer": (with_switch - without) / seconds,
        },
    }  # fmt: skip


def mixtral_stored(setting: Setting) -> Figures:
    """As many bfloat16 experts as fit, the others on the host: read by the kernels, and waited for."""
    device = setting.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    fits = max(1, int((free - (9 << 30)) / 352.4e6)) if free else 6
    # Both are timed, whatever the model would choose.
    with mock.patch.object(TierCosts, "decodes_mapped", return_value=True):
        core = load_engine(setting.layout("mixtral-8x7b", 1, resident=fits, host=True), max_num_seqs=4)
    costs, mapped = core.model.pool.cache.costs, core.model.pool.mapped
    found = {**_resident(core), "tier_costs": asdict(costs) if costs else None}
    if mapped is not None:
        before = core.stats().expert_host_bytes, mapped.counted_steps
        found["decode_1_mapped"] = figures = decode(core, setting, [0])
        # The mean of the steps that have been counted, which is not of the last few.
        steps = mapped.counted_steps - before[1]
        if steps:
            figures["host_bytes"] = host_bytes = (core.stats().expert_host_bytes - before[0]) / steps
            figures["bus_share"] = host_bytes / setting.limits.bus_bytes_per_s / figures["seconds"]
        for layer in core.model.pool.layers:
            layer.mapped = None
        core.runner.graphs = None
    found["decode_1"] = decode(core, setting, [0])
    add(core, 0, setting.switch_prompt, 1)
    return {**found, "prefill_seconds": first_token_seconds(core, 0, setting.switch_prompt)}


PARTS: dict[str, Callable[[Setting], Figures]] = {
    "mixtral_two": mixtral_two,
    "mixtral_four": mixtral_four,
    "mixtral_switch": mixtral_switch,
    "qwen3_shared": qwen3_shared,
    "qwen3_delta": qwen3_delta,
    "mixtral_stored": mixtral_stored,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="real")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    setting = Setting(arguments.device, arguments.shape)
    figures = {"limits": asdict(setting.limits), **PARTS[arguments.part](setting)}
    arguments.out.write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
