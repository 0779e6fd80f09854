"""From checkpoints to the systems that are compared: bundles planned once and kept, options of each engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from polymoe.bench.partition import PartitionSystem
from polymoe.bench.stock import StockSystem
from polymoe.bench.swap import SwapSystem
from polymoe.bench.systems import ON_ONE_BUNDLE, SYSTEMS, EngineSystem, System
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig, format_bytes
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.machine import available_cores, available_memory, split_cores
from polymoe.model.backends.device_facts import choose_device
from polymoe.offline.cache import plan_cached
from polymoe.offline.plan.budget import parse_memory
from polymoe.offline.plan.options import PlanOptions

# What a process holds beside weights and KV cache (interpreter, torch, transformers, activations), in bytes.
_PROCESS_BYTES = 700 << 20


@dataclass(frozen=True)
class Builder:
    """Makes systems that differ in nothing but what their names say.

    `checkpoints`: variant -> folder. `root`: where bundles are kept. `memory`: budget of the bundle of all variants.
    """

    checkpoints: Mapping[str, Path]
    root: Path
    memory: str = "1.0x"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None
    kv_cache_bytes: int = 256 << 20
    max_num_seqs: int = 64

    @property
    def variants(self) -> list[str]:
        return list(self.checkpoints)

    def shared_bundle(self, plan: str = "") -> Bundle:
        """The bundle of all variants: policy `paper`, or what `plan` (POLICY[@MEMORY]) says."""
        policy, _, memory = plan.partition("@")
        return self._bundle(self.variants, policy or "paper", memory or self.memory)

    def system(self, name: str) -> System:
        """A system that `check_systems` knows, not started yet."""
        name, _, plan = name.partition(":")
        if name == "swap":
            bundles = {v: self._bundle([v], "separate", None) for v in self.variants}
            sizes = {v: b.resident_bytes.total for v, b in bundles.items()}
            return SwapSystem({v: self._config(b) for v, b in bundles.items()}, sizes)
        if name == "partition":
            return self._partition()
        if name == "transformers":
            device = choose_device(self.device)
            return StockSystem(self.checkpoints, device, self.dtype, self.max_num_seqs, self.threads)
        config = self._config(self.shared_bundle(plan))
        if name == "per-variant":
            config = msgspec.structs.replace(config, max_variants_per_step=1)
        elif name == "reconfigure":
            config = msgspec.structs.replace(config, slots=1)
        elif name == "paper":
            config = msgspec.structs.replace(
                config, slots=1, prefetch=False, max_num_seqs=1, expert_cache_bytes=0, enable_prefix_caching=False
            )
        return EngineSystem(config, self.variants[0] if name == "single" else None)

    def check_memory(self, names: Sequence[str]) -> None:
        """All systems are loaded at once. Raises `PolymoeError` when that would not fit this machine."""
        available = available_memory()
        needed = sum(self._bytes_of(name) for name in names)
        if available is not None and needed > available:
            raise PolymoeError(
                f"these {len(names)} systems need about {format_bytes(needed)} at the same time and "
                f"{format_bytes(available)} are free; choose fewer with --systems."
            )

    def _bytes_of(self, name: str) -> int:
        if name == "partition":
            share = self.shared_bundle().resident_bytes.total
            return share + self.kv_cache_bytes + len(self.variants) * _PROCESS_BYTES
        if name == "transformers":
            return sum(file.stat().st_size for path in self.checkpoints.values() for file in path.glob("*.safetensors"))
        plan = name.partition(":")[2]
        bundle = self._bundle(self.variants[:1], "separate", None) if name == "swap" else self.shared_bundle(plan)
        return bundle.resident_bytes.total + self.kv_cache_bytes + _PROCESS_BYTES

    def _partition(self) -> PartitionSystem:
        count = len(self.variants)
        share = self.shared_bundle().resident_bytes.total // count
        configs = {}
        for variant in self.variants:
            bundle = self._bundle([variant], "separate", str(share))
            configs[variant] = msgspec.structs.replace(
                self._config(bundle),
                kv_cache_bytes=self.kv_cache_bytes // count,
                expert_cache_bytes=share - bundle.resident_bytes.total,
            )
        return PartitionSystem(configs, split_cores(available_cores()[: self.threads], count))

    def _config(self, bundle: Bundle) -> EngineConfig:
        return EngineConfig(
            bundle=str(bundle.path),
            device=self.device,
            dtype=self.dtype,
            num_threads=self.threads,
            kv_cache_bytes=self.kv_cache_bytes,
            max_num_seqs=self.max_num_seqs,
            max_waiting=1 << 20,  # an open loop may pile up requests; none is refused
            admission_factor=None,
        )

    def _bundle(self, variants: Sequence[str], policy: str, memory: str | None) -> Bundle:
        specs = [f"{variant}={self.checkpoints[variant]}" for variant in variants]
        return Bundle.open(plan_cached(specs, policy, memory, self.root))


def check_systems(names: Sequence[str]) -> list[str]:
    """The names, each once. Raises `PolymoeError` for a system, policy or budget that does not exist."""
    chosen = list(dict.fromkeys(names))
    kinds = {name: name.partition(":")[0] for name in chosen}
    unknown = [name for name, kind in kinds.items() if kind not in SYSTEMS]
    if unknown or not chosen:
        raise PolymoeError(f"unknown system {', '.join(unknown) or '(none)'}; there are {', '.join(SYSTEMS)}.")
    for name, kind in kinds.items():
        _, colon, plan = name.partition(":")
        if colon and kind not in ON_ONE_BUNDLE:
            raise PolymoeError(
                f"{name!r}: {kind} has bundles of its own; only {', '.join(ON_ONE_BUNDLE)} take a policy."
            )
        policy, at, memory = plan.partition("@")
        if colon:
            PlanOptions().check(policy)
        if at:
            parse_memory(memory)
    return chosen


def build_systems(builder: Builder, names: Sequence[str], console: Console) -> dict[str, System]:
    """Plan what is missing. Raises `PolymoeError` for too little memory or a family that cannot be served."""
    systems = {}
    for name in names:
        with console.status(f"planning {name}"):
            systems[name] = builder.system(name)
    builder.check_memory(names)
    return systems
