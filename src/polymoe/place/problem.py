"""What is to be placed: families of variants with their rates, and devices. Records and their checks, no arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from polymoe.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Family:
    """Variants that may share a pool, as `polymoe inspect --json` describes them. V variants."""

    name: str
    variants: tuple[str, ...]
    distance: NDArray[np.float32]  # [V, V], relative to the norm of the weights, 0 on the diagonal
    expert_bytes: int  # all experts of one variant, as stored
    nonexpert_bytes: int  # of one variant
    stored_bits: int = 16  # of a weight as stored
    sources: Mapping[str, str] = field(default_factory=dict)  # variant -> checkpoint

    def __post_init__(self) -> None:
        shape, count = self.distance.shape, len(self.variants)
        if shape != (count, count):
            raise ConfigError(f"family {self.name}: {count} variants need distances [{count}, {count}], got {shape}.")
        if not count:
            raise ConfigError(f"family {self.name} has no variant.")
        if not (np.isfinite(self.distance).all() and (self.distance >= 0).all()):
            raise ConfigError(f"family {self.name}: distances must be numbers of at least 0; run inspect again.")
        if not np.allclose(self.distance, self.distance.T, atol=1e-4) or np.diagonal(self.distance).any():
            raise ConfigError(f"family {self.name}: distances must be symmetric with zeros on the diagonal.")
        if self.expert_bytes <= 0 or self.nonexpert_bytes < 0:
            raise ConfigError(f"family {self.name}: bytes must be positive.")


@dataclass(frozen=True)
class Device:
    """One accelerator, or the cores of one replica."""

    name: str
    memory: int  # bytes for weights: without keys, values and caches
    rate: float  # requests a second that it serves at most

    def __post_init__(self) -> None:
        if self.memory <= 0:
            raise ConfigError(f"device {self.name} has no memory left for weights; lower its reserve.")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"device {self.name}: requests_per_second must be more than 0, got {self.rate}.")


@dataclass(frozen=True, eq=False)
class Problem:
    """Raises `ConfigError` for what cannot be meant: names given twice, rates of nobody, variants without a rate."""

    families: tuple[Family, ...]
    devices: tuple[Device, ...]
    rates: Mapping[str, float]  # variant -> requests a second
    error: float = 0.01  # of a shared weight, relative to the norm, that is accepted
    slack: float = 0.05  # how much more than its part of the load a device may have

    def __post_init__(self) -> None:
        names = [name for family in self.families for name in family.variants]
        for what, given in (
            ("variant", names),
            ("device", [device.name for device in self.devices]),
            ("family", [family.name for family in self.families]),
        ):
            if twice := [name for name, count in Counter(given).items() if count > 1]:
                raise ConfigError(f"{what} {twice[0]} is given twice; every {what} needs a name of its own.")
            if not given:
                raise ConfigError(f"there is no {what}; give at least one.")
        known = set(names)
        if unknown := [name for name in self.rates if name not in known]:
            raise ConfigError(f"a rate is given to {', '.join(unknown[:5])}, which no family has.")
        if missing := [name for name in names if name not in self.rates]:
            raise ConfigError(f"{', '.join(missing[:5])} has no rate; give it one under [rate] (0 if nobody asks).")
        for name, rate in self.rates.items():
            if not 0 <= rate < math.inf:
                raise ConfigError(f"the rate of {name} must be a number of at least 0, got {rate}.")
        if not 0 < self.error < 1:
            raise ConfigError(f"error must be between 0 and 1, got {self.error}; 0.01 is one percent of the weights.")
        if not 0 <= self.slack < math.inf:
            raise ConfigError(f"slack must be at least 0, got {self.slack}.")


@dataclass(frozen=True)
class PlacedPool:
    """What one device holds."""

    device: str
    family: str
    base: str  # the variant whose experts are stored whole
    shares: Mapping[str, float]  # variant -> part of its requests that come here; a part below 1: it has replicas
    num_bytes: int
    rate: float  # requests a second


@dataclass(frozen=True)
class Placement:
    """Where every variant lives. Shares of a variant sum to 1 over the pools."""

    pools: tuple[PlacedPool, ...]

    @property
    def num_bytes(self) -> int:
        return sum(pool.num_bytes for pool in self.pools)

    def homes(self) -> dict[str, frozenset[str]]:
        """Variant -> the devices that hold it."""
        found: dict[str, set[str]] = {}
        for pool in self.pools:
            for variant in pool.shares:
                found.setdefault(variant, set()).add(pool.device)
        return {variant: frozenset(devices) for variant, devices in found.items()}

    def moved(self, before: Placement) -> list[str]:
        """Variants of both placements that live elsewhere now."""
        now = self.homes()
        return [name for name, devices in before.homes().items() if name in now and now[name] != devices]
