"""`polymoe place`'s input: a TOML file with families, devices and rates.

error = 0.01                      # of shared weights, that is accepted

[[family]]
name = "chat"
distances = "chat.json"           # polymoe inspect NAME=PATH… --json chat.json

[[device]]
name = "gpu"
count = 8
memory = "141GiB"
reserve = "21GiB"                 # for keys, values and caches
requests_per_second = 20

[rate]                            # requests a second of each variant
math = 2.5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from polymoe.config import parse_bytes
from polymoe.deploy.config import DeployConfig, read_toml
from polymoe.errors import ConfigError
from polymoe.place.problem import Device, Family, PlacedPool, Placement, Problem


class _Inspected(msgspec.Struct, frozen=True):
    """What `polymoe inspect --json` writes."""

    variants: list[str]
    sources: dict[str, str]
    expert_bytes: int
    nonexpert_bytes: int
    bits: int
    distance: list[list[float]]


class _Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    distances: str


class _Devices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    memory: str | int
    requests_per_second: float
    count: int = 1
    reserve: str | int = 0


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    family: list[_Family]
    device: list[_Devices]
    rate: dict[str, float]
    error: float = 0.01
    slack: float = 0.05


def read_problem(path: Path) -> Problem:
    """Raises `ConfigError`; paths in the file are relative to its folder."""
    table = read_toml(path)
    try:
        given = msgspec.convert(table, _Input)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}; `polymoe place --help` shows what the file holds.") from error
    families = tuple(_family(item, path.parent) for item in given.family)
    devices = tuple(device for item in given.device for device in _devices(item, str(path)))
    try:
        return Problem(families, devices, given.rate, given.error, given.slack)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _family(item: _Family, folder: Path) -> Family:
    path = folder / Path(item.distances).expanduser()
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Inspected)
        distance = np.array(found.distance, dtype=np.float32)
    except OSError as error:
        raise ConfigError(
            f"family {item.name}: {path} cannot be read ({error.strerror}); make it with "
            f"`polymoe inspect NAME=PATH… --json {path}`."
        ) from error
    except (msgspec.DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"family {item.name}: {path} is not what `polymoe inspect NAME=PATH… --json` writes ({error})."
        ) from error
    return Family(
        item.name, tuple(found.variants), distance, found.expert_bytes, found.nonexpert_bytes, found.bits,
        found.sources,
    )  # fmt: skip


def _devices(item: _Devices, where: str) -> list[Device]:
    if item.count < 1:
        raise ConfigError(f"{where}: device {item.name}: count must be at least 1, got {item.count}.")
    memory, reserve = (parse_bytes(v) if isinstance(v, str) else v for v in (item.memory, item.reserve))
    if reserve >= memory:
        raise ConfigError(f"{where}: device {item.name} reserves all of its memory; nothing is left for weights.")
    names = [item.name] if item.count == 1 else [f"{item.name}-{number}" for number in range(item.count)]
    return [Device(name, memory - reserve, item.requests_per_second) for name in names]


def present_placement(config: DeployConfig) -> Placement:
    """What a deploy configuration that `polymoe place` wrote says. Raises `ConfigError` for another one."""
    pools = []
    for pool in config.pools:
        if not pool.devices or not pool.shares or pool.is_bundle:
            raise ConfigError(f"pool {pool.name} names no devices and shares; give a file that `polymoe place` wrote.")
        base = _name(pool.sources[0])
        for device in pool.devices:
            shares = {name: share / len(pool.devices) for name, share in pool.shares.items()}
            pools.append(PlacedPool(device, pool.family, base, shares, 0, 0.0))
    return Placement(tuple(pools))


def _name(source: Any) -> str:
    return str(source).partition("=")[0]
