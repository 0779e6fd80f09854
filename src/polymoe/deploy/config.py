"""The deploy configuration: which pools run, where, and what each of them serves. A TOML file.

[server]                      # options of `polymoe serve`: host, port, api_key …
port = 8000

[[pool]]
name = "chat"                 # one engine of one base family
sources = ["bundles/chat"]    # a bundle, or checkpoints as NAME=PATH
replicas = 2
cpus = 1                      # of each replica
[pool.engine]                 # options of the engine
slots = 4
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from polymoe.config import EngineConfig
from polymoe.errors import ConfigError
from polymoe.options import Field, options_of
from polymoe.server.settings import ServerSettings

INGRESS, LIMITS = "ingress", "limits"  # deployments beside the pools

# Options of a server that has the engine in its own hands, or the connections. Here Ray has engines, and its proxy may
# have connections.
_ENGINES = ("heartbeat_timeout", "restart_engine")
_CONNECTIONS = ("ssl_certfile", "ssl_keyfile", "max_connections", "header_timeout", "write_timeout")


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Replicas of a pool, by its work and by its first tokens."""

    min_replicas: int = 1
    max_replicas: int
    ongoing_requests: float = 16.0  # of a replica, running or waiting, that is aimed at
    first_token: float = 0.0  # seconds, of nine in ten requests, that are aimed at; 0: no matter
    upscale_delay: float = 10.0  # seconds
    downscale_delay: float = 300.0  # seconds


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine of one base family with a set of variants, and how many replicas of it run.

    A variant may be in several pools; `shares` says what part of its requests comes to this one (1 where it says
    nothing, divided by the sum over its pools).
    """

    name: str
    sources: list[str]  # a bundle, or checkpoints as NAME=PATH
    family: str = ""
    policy: str = "auto"
    memory: str | None = None
    replicas: int = 1
    autoscaling: Autoscaling | None = None
    cpus: float = 1.0  # of each replica
    gpus: float = 0.0
    devices: list[str] = []  # where placement put the replicas
    shares: dict[str, float] = {}
    engine: dict[str, Any] = {}  # options of the engine

    @property
    def is_bundle(self) -> bool:
        return len(self.sources) == 1 and "=" not in self.sources[0]

    def engine_config(self, bundle: str) -> EngineConfig:
        """Raises `ConfigError`, naming the pool."""
        with_defaults = {"num_threads": max(1, int(self.cpus))} | self.engine
        try:
            return EngineConfig(bundle=bundle, **with_defaults)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"pool {self.name}: {error}") from error


class DeployConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Checked as far as it can be without reading a bundle."""

    server: ServerSettings
    pools: tuple[Pool, ...]
    ingresses: int = 1
    http: Literal["ingress", "proxy"] = "ingress"  # who has the connections: an ingress itself, or Ray's proxy

    def __post_init__(self) -> None:
        if not self.pools:
            raise ConfigError("the deploy configuration has no [[pool]]; give at least one.")
        if self.ingresses < 1:
            raise ConfigError(f"ingresses must be at least 1, got {self.ingresses}.")
        if self.server.port == 0:
            raise ConfigError("port 0 would be another one for each ingress; choose a port.")
        if self.ingresses > 1 and self.server.admin_key is not None:
            raise ConfigError("with an admin key there is one ingress, which changes variants; leave `ingresses` out.")
        for name, count in Counter(pool.name for pool in self.pools).items():
            if count > 1:
                raise ConfigError(f"pool {name} is given twice; every pool needs a name of its own.")
        for pool in self.pools:
            _check(pool)
            if pool.name in (INGRESS, LIMITS):
                raise ConfigError(f"pool {pool.name}: that name is taken; choose another.")

    @property
    def shares_limits(self) -> bool:
        """Whether limits of keys are counted by several ingresses."""
        return self.ingresses > 1 and self.server.keys is not None


def _check(pool: Pool) -> None:
    scaling = pool.autoscaling
    for wrong, message in (
        (not pool.name or not pool.name.replace("-", "").replace("_", "").replace(".", "").isalnum(),
         "its name must be letters, digits, '.', '_' and '-'"),
        (not pool.sources, "name a bundle or checkpoints in `sources`"),
        (pool.replicas < 1, f"replicas must be at least 1, got {pool.replicas}"),
        (not pool.cpus > 0, f"cpus must be more than 0, got {pool.cpus}"),
        (pool.gpus < 0, f"gpus must be at least 0, got {pool.gpus}"),
        (any(not 0 < share <= 1 for share in pool.shares.values()), "shares must be more than 0 and at most 1"),
        (scaling is not None and not 1 <= scaling.min_replicas <= scaling.max_replicas,
         "min_replicas must be at least 1 and at most max_replicas"),
        (scaling is not None and not scaling.ongoing_requests > 0, "ongoing_requests must be more than 0"),
        (scaling is not None and not scaling.first_token >= 0, "first_token must be at least 0 seconds"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"pool {pool.name!r}: {message}.")
    if not pool.is_bundle and any("=" not in source for source in pool.sources):
        raise ConfigError(f"pool {pool.name!r}: sources are one bundle, or checkpoints as NAME=PATH, not both.")
    pool.engine_config("")


def read_deploy_config(path: Path) -> DeployConfig:
    """Raises `ConfigError`; the message names the file and the key."""
    return of_table(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Raises `ConfigError`, also for a file that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}; give a deploy configuration.") from error


def of_table(table: Mapping[str, Any], where: str) -> DeployConfig:
    """The configuration of a TOML table; `where` is what messages call it."""
    if unknown := [key for key in table if key not in ("server", "pool", "ingresses", "http")]:
        raise ConfigError(
            f"{where}: there is no option {unknown[0]!r}; there are ingresses, http, [server] and [[pool]]."
        )
    try:
        pools = msgspec.convert(table.get("pool", []), tuple[Pool, ...])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: [[pool]]: {error}") from error
    try:
        ingresses = msgspec.convert(table.get("ingresses", 1), int)
        http = msgspec.convert(table.get("http", "ingress"), Literal["ingress", "proxy"])
    except msgspec.ValidationError as error:
        raise ConfigError(f'{where}: ingresses is a number, http is "ingress" or "proxy": {error}') from error
    pools = tuple(
        msgspec.structs.replace(
            pool, engine=_options(options_of(EngineConfig), pool.engine, f"{where}: pool {pool.name}: engine")
        )
        for pool in pools
    )
    given = table.get("server", {})
    if refused := [key for key in given if key in _ENGINES]:
        raise ConfigError(f"{where}: server.{refused[0]} has no effect here: Ray replaces engines. Leave it out.")
    if http == "proxy" and (refused := [key for key in given if key in _CONNECTIONS]):
        raise ConfigError(
            f"{where}: server.{refused[0]} has no effect where Ray's proxy has the connections (http); leave "
            "it out; for TLS and limits of connections put a gateway in front."
        )
    server = ServerSettings(**_options(options_of(ServerSettings), table.get("server", {}), f"{where}: server"))
    try:
        return DeployConfig(server=server, pools=pools, ingresses=ingresses, http=http)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _options(fields: tuple[Field, ...], table: Any, where: str) -> dict[str, Any]:
    """TOML key -> value, as fields of the record, read and checked as those of `polymoe serve --config` are."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table of options.")
    by_key = {field.key: field for field in fields}
    if unknown := [key for key in table if key not in by_key]:
        raise ConfigError(f"{where}: there is no option {unknown[0]!r}; see `polymoe serve --help`.")
    return {
        by_key[key].attribute: by_key[key].value(value, f"{where}.{key}", f"{where}.{key}")
        for key, value in table.items()
    }
